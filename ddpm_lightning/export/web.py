"""A page that runs a model in the browser: static files, which need no server.

The page's own files lie in ``page/``. With the model they become a folder: the network as ONNX in ``model.js``, beside
its schedule as a table, and in ``runtime.js`` what runs the network or where the browser finds it. Scripts rather than
data files, since a browser lets a page from the disk load no others.
"""

import base64
import gzip
import hashlib
import json
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ddpm_lightning.errors import InputError
from ddpm_lightning.export.graphs import export_onnx
from ddpm_lightning.process import (
    AnalyticVariance,
    CategoricalDecoder,
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    LearnedRangeVariance,
    PlainGaussian,
    VelocityParameterization,
    VParameterization,
    X0Parameterization,
)
from ddpm_lightning.samplers import DPMSolverSampler
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.training import DiffusionModule

__all__ = ["RUNTIME_VERSION", "describe_for_page", "runtime_script", "write_page"]

RUNTIME_VERSION = "1.30.0"
"""Of onnxruntime-web, with which the page was tested."""

_URL = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}/dist/"
# what the browser, or --runtime, must find: SHA-384 as subresource integrity writes it
_RUNTIME = {
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
# what diffusion.js knows
_KNOWN = {
    "parameterization": (EpsParameterization, X0Parameterization, VParameterization, VelocityParameterization),
    "variance": (FixedLargeVariance, FixedSmallVariance, LearnedRangeVariance, AnalyticVariance),
    "decoder": (DiscretizedGaussian, CategoricalDecoder, PlainGaussian),
}
_EXAMPLES = 10
_EXAMPLE_STEPS = 20


def write_page(module: DiffusionModule, folder: Path, name: str, runtime: Path | None = None) -> Path:
    """Write the page of a module's averaged model into ``folder`` and return the path of its index.html.

    Args:
        module: of images with grey levels, without conditions other than classes.
        folder: is made, or holds a page that is replaced.
        name: of the model, for the page's heading.
        runtime: the folder ``dist`` of the npm package onnxruntime-web, whose files become part of the page. None: the
            browser loads them from a public server.

    Raises:
        InputError: a model that the page cannot show, files of another version, a folder that holds something else or
            cannot be written.
    """
    _check(module)
    scripts = {"runtime.js": runtime_script(runtime)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / "diffusion.js").is_file():
            raise InputError(f"--out {folder} is not empty and holds no page: choose another folder")
        scripts["model.js"] = _model_script(module, name)
        for source in files("ddpm_lightning.export").joinpath("page").iterdir():
            (folder / source.name).write_bytes(source.read_bytes())
        for script, text in scripts.items():
            (folder / script).write_text(f'"use strict";\n{text}', encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror}): choose another folder") from error
    return folder / "index.html"


def _model_script(module: DiffusionModule, name: str) -> str:
    description = {
        "name": name,
        "shape": list(module.shape),
        "levels": module.levels,
        "classes": module.num_classes if module.class_conditional else None,
        "no_class": module.label_dropout > 0,
        **describe_for_page(module.ema_model),
        "examples": _examples(module),
    }
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch, "network.onnx")
        export_onnx(module.ema_model, graph, module.shape, description["classes"])
        network = _packed(graph.read_bytes())
    return f'const MODEL = {json.dumps(description)};\nconst NETWORK = "{network}";\n'


def describe_for_page(model: DiffusionModel) -> dict[str, Any]:
    """What the page's mathematics must know of a model, as plain data: its parts by their names, and tables with an
    entry for each state n = 1..T: its time ``t``, ``gamma``, what the network is ``told`` of it, ``log_unit_var``."""
    times, schedule, variance = model.grid[1:], model.schedule, model.reverse_process.variance
    with torch.no_grad():
        tables = {
            "t": times,
            "gamma": schedule.gamma(times),
            "told": model.denoiser.conditioning(schedule, times),
            "log_unit_var": schedule.log_unit_var(times),
        }
        if isinstance(variance, AnalyticVariance):
            tables["log_eps_mse"] = variance.log_eps_mse(tables["gamma"])
    return {
        "clip_x0": model.clip_x0,
        **{part: type(value).__name__ for part, value in _parts(model).items()},
        **{table: values.tolist() for table, values in tables.items()},
    }


def _parts(model: DiffusionModel) -> dict[str, object]:
    return {
        "parameterization": model.denoiser.parameterization,
        "variance": model.reverse_process.variance,
        "decoder": model.decoder,
    }


def _check(module: DiffusionModule) -> None:
    model = module.ema_model
    other = [name for name in module.conditions if name != "label"]
    reason = ""
    if module.levels is None:
        reason = "shows pictures, and this is a model of fields"
    elif len(module.shape) != 3 or module.shape[0] not in (1, 3):
        reason = f"shows grey or coloured pictures, and images of this model have the shape {list(module.shape)}"
    elif other:
        reason = f"knows of classes only, and this model is told a {other[0]} of each image"
    elif not model.has_plain_process:
        reason = "knows a fixed encoder and one noise level for all pixels only"
    for part, value in _parts(model).items():
        if type(value) not in _KNOWN[part]:
            known = ", ".join(each.__name__ for each in _KNOWN[part])
            reason = reason or f"does not know {type(value).__name__}, only {known}"
    if reason:
        raise InputError(f"--to web: the page {reason}; export to onnx or torch_export")


def _examples(module: DiffusionModule) -> list[dict[str, Any]]:
    """Images of the model, of all classes in turn, of which the page shows noisy states: grey levels, base64."""
    draw = SampleRequest(sampler=DPMSolverSampler(), steps=_EXAMPLE_STEPS, cap_steps=True).on(module)
    index = torch.arange(_EXAMPLES)
    labels = draw.label(index)
    return [
        {
            "pixels": base64.b64encode(image.numpy().tobytes()).decode(),
            "label": None if labels is None else int(labels[k]),
        }
        for k, image in enumerate(draw(index))
    ]


def runtime_script(folder: Path | None = None) -> str:
    """The script runtime.js: the two files of onnxruntime-web in a ``folder``, or where a browser finds them.

    Raises:
        InputError: a folder without them, or with another version.
    """
    entries = [{"name": name, "integrity": digest} for name, digest in _RUNTIME.items()]
    if folder is not None:
        for entry in entries:
            entry["embedded"] = _packed(_verified(folder / entry["name"], entry["integrity"]))
    return f"const RUNTIME = {json.dumps({'url': _URL, 'files': entries}, indent=1)};\n"


def _verified(path: Path, integrity: str) -> bytes:
    get = f"npm pack onnxruntime-web@{RUNTIME_VERSION} brings it, in package/dist"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"--runtime {path.parent}: {path.name} cannot be read ({error.strerror}); {get}") from None
    if "sha384-" + base64.b64encode(hashlib.sha384(content).digest()).decode() != integrity:
        raise InputError(
            f"--runtime {path.parent}: {path.name} is not that of onnxruntime-web {RUNTIME_VERSION}; {get}"
        )
    return content


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()
