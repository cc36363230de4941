"""``ddpm evaluate``, ``export`` and others: functions of a finished run, each with its docstring for a help text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ddpm_lightning.command_line import call
from ddpm_lightning.errors import InputError
from ddpm_lightning.evaluation.density import density
from ddpm_lightning.evaluation.flow import flow
from ddpm_lightning.evaluation.forms import forms
from ddpm_lightning.evaluation.ood import ood
from ddpm_lightning.evaluation.quality import quality
from ddpm_lightning.evaluation.reweighting import reweight
from ddpm_lightning.evaluation.variance import variance
from ddpm_lightning.export import export_onnx, export_program, save_model
from ddpm_lightning.export.web import RUNTIME_VERSION, write_page
from ddpm_lightning.projects import new
from ddpm_lightning.runs import Run
from ddpm_lightning.runs.averages import average

__all__ = ["COMMANDS", "EVALUATIONS", "export", "run_command"]

Format = Literal["safetensors", "diffusers", "onnx", "torch_export", "web"]
SUFFIXES: dict[Format, str] = {
    "safetensors": ".safetensors",
    "diffusers": "",
    "onnx": ".onnx",
    "torch_export": ".pt2",
    "web": "",
}
# the arguments of a module that say how large a condition is
_SIZES = {"label": "num_classes", "vector": "vector_size", "field": "field_channels"}
EVALUATIONS: dict[str, Callable[..., Any]] = {each.__name__: each for each in (quality, ood, flow, forms, variance)}


def export(run: str, to: Format, out: str, checkpoint: str = "last", runtime: str | None = None) -> None:
    """Write the averaged model of a run for use elsewhere.

    safetensors   one file, weights and parts: ddpm_lightning.export.load_model(FILE) is the DiffusionModel again
    diffusers     a folder: import ddpm_lightning.export.diffusers, then DDPMPipeline.from_pretrained(FOLDER)
    onnx          the network alone, inputs x, t (and label, vector, field), for any batch size
    torch_export  the same as a .pt2 of torch.export
    web           a folder: open FOLDER/index.html in a browser, which draws images with the model

    onnx and torch_export know nothing of the schedule: t is the scalar that the model's conditioning gives its network.
    A model of fields has standardised values: those of the data are std x + mean, and both are printed.

    Args:
        run: folder of the run
        to: format
        out: the file, or for diffusers and web the folder
        checkpoint: last, best or a file
        runtime: of web: folder of onnxruntime-web's files, to put them into the page, which then needs no network; a
            browser loads them from a public server without it
    """
    if runtime is not None and to != "web":
        raise InputError(f"--runtime {runtime} is for --to web: leave it out")
    path = Path(out).expanduser()
    if path.suffix != SUFFIXES[to]:
        raise InputError(f"--out {out}: the name of {to} ends in {SUFFIXES[to] or 'no suffix: it is a folder'}")
    module = Run(run).load_diffusion(checkpoint)
    sizes = {name: module.hparams[_SIZES[name]] for name in module.conditions}
    scale = module.hparams.get("scale")
    if to == "web":
        page = write_page(module, path, Run(run).folder.name, None if runtime is None else Path(runtime).expanduser())
        source = "the browser loads onnxruntime-web" if runtime is None else "it holds onnxruntime-web"
        print(f"web: {page}: open it in a browser ({source} {RUNTIME_VERSION})")
        return
    if to == "safetensors":
        save_model(module.ema_model, path, scale)
    elif to != "diffusers":
        write = export_onnx if to == "onnx" else export_program
        write(module.ema_model, path, module.shape, **{_SIZES[name]: size for name, size in sizes.items()})
    else:
        reason = "draw pictures, and this is a model of fields" if module.levels is None else ""
        for name in [name for name in sizes if name != "label"]:
            reason = f"know of classes only, and this model is told a {name} of each image"
        if reason:
            raise InputError(f"--to diffusers: its pipelines {reason}; export to safetensors, onnx or torch_export")
        from ddpm_lightning.export.diffusers import to_pipeline

        pipeline: Any = to_pipeline(module.ema_model, module.shape)
        pipeline.save_pretrained(path)
    print(f"{to}: {path}")
    if scale is not None:
        print(f"standardised: values of the data are std x + mean, mean {scale['mean']}, std {scale['std']}")


COMMANDS: dict[str, Callable[..., Any]] = {each.__name__: each for each in (density, reweight, average, export, new)}


def run_command(name: str, args: list[str]) -> None:
    """Run the command that ``name`` says with the words after it."""
    if name in COMMANDS:
        call(COMMANDS[name], args, f"ddpm {name}")
        return
    if args[0] not in EVALUATIONS:
        raise InputError(f"evaluate {args[0]}: there are {', '.join(EVALUATIONS)}")
    call(EVALUATIONS[args[0]], args[1:], f"ddpm evaluate {args[0]}")
