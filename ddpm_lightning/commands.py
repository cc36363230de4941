"""``ddpm evaluate`` and ``ddpm export``: functions of a finished run, each with its docstring for a help text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml

from ddpm_lightning.command_line import call
from ddpm_lightning.data import MNIST, levels_to_model
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.flow import Dequantization, measure_flow
from ddpm_lightning.evaluation.forms import compare_forms
from ddpm_lightning.evaluation.ood import measure_ood
from ddpm_lightning.evaluation.quality import Samples, measure_quality
from ddpm_lightning.evaluation.variance import measure_variance
from ddpm_lightning.export import export_onnx, export_program, save_model
from ddpm_lightning.objectives import DenoisingElbo
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import DDIMSampler, Sampler

__all__ = ["export", "flow", "forms", "ood", "quality", "run_command", "variance"]

Format = Literal["safetensors", "diffusers", "onnx", "torch_export"]
SUFFIXES: dict[Format, str] = {"safetensors": ".safetensors", "diffusers": "", "onnx": ".onnx", "torch_export": ".pt2"}


def quality(
    run: str,
    checkpoint: str = "last",
    n: int = 1000,
    sampler: Sampler | None = None,
    steps: int | None = None,
    guidance_scale: float = 1.0,
    classifier: str | None = None,
    data_root: str | None = None,
    seed: int = 0,
    batch_size: int = 100,
    device: str = "cpu",
    out: str | None = None,
) -> None:
    """How good are the samples, and are they copies of training images?

    n samples of the averaged model, n training images (the floor) and n validation images are compared with the same n
    test images, in the features of a small classifier of the data (docs/quality.md says what is measured). Numbers
    compare with others of the same n and the same classifier only.

    Then the training image nearest to each sample is looked for, by Euclidean distance in pixels (model range) and in
    features, and the one nearest to each test image, which cannot be a copy. Samples much nearer than the test images
    were learnt by heart. neighbours.png shows some of both: samples, below them the two nearest training images in
    pixels and the two nearest in features, then the same for test images.

    Writes quality.txt, quality.json and neighbours.png.

    Args:
        run: folder of the run
        checkpoint: last, best or a file
        n: samples, and real images
        sampler: class of the sampler, by default DDIMSampler; its arguments as --sampler.eta 1
        steps: steps of the sampler, by default all T
        guidance_scale: scale of classifier-free guidance, 1 for none
        classifier: mnist, digits or a file, by default the one for such images
        data_root: folder that holds MNIST/raw, by default the one of the run's configuration
        seed: seed of the samples and of the choice of real images
        batch_size: images at a time
        device: where to work, cpu or cuda
        out: folder for the results, by default RUN/quality
    """
    samples = Samples(n, sampler or DDIMSampler(), steps, batch_size, guidance_scale, seed)
    module, data = Run(run).load(checkpoint)
    if data_root is not None and isinstance(data, MNIST):
        data.root = data_root
    text, record, picture = measure_quality(module.to(device), data, samples, classifier)
    _write(run, "quality", out, {"quality.txt": text, "quality.json": record, "neighbours.png": picture})
    print(text)


def ood(
    run: str,
    checkpoint: str = "last",
    images: int = 500,
    steps: int = 20,
    T: int | None = None,
    seed: int = 0,
    batch_size: int = 100,
    device: str = "cpu",
    out: str | None = None,
) -> None:
    """Does the bound tell images of another kind from the test images?

    The same test images are shown as they are, rotated by 90 degrees, inverted and with their pixels shuffled, and
    beside them uniform noise and the embedded 8x8 digits, enlarged. Each set's bits/dim come from the denoising form of
    the bound. Two scores are judged by their area under the ROC curve (AUROC; 0.5 is chance):

        likelihood   bits/dim: an image of low likelihood is an outlier
        typicality   |bits/dim - mean bits/dim of validation images|: an unusually likely image is an outlier too

    Image k of every set has the same noise. By default the model is evaluated as a chain of steps + 1 states, every
    step of it, rather than at a few steps of its own long chain: a bound of its own, a little looser, and with far less
    noise in each image.

    The standard error of a mean is taken over images. The standard error of an AUROC is from 1,000 bootstrap samples of
    the images, which keep an image and its altered version together, at a fixed validation mean.

    Writes ood.txt, ood.json, ood.csv (bits/dim of every image) and ood.png.

    Args:
        run: folder of the run
        checkpoint: last, best or a file
        images: images in each set, 2 or more
        steps: reverse steps evaluated for each image
        T: evaluate a chain of T states, by default steps + 1, at most the model's
        seed: seed of the choice of images and of the noise
        batch_size: images at a time
        device: where to work, cpu or cuda
        out: folder for the results, by default RUN/ood
    """
    at_least(2, images=images)
    at_least(1, batch_size=batch_size)
    module, data = Run(run).load(checkpoint)
    estimator = DenoisingElbo(steps, min(steps + 1, module.ema_model.T) if T is None else T)
    text, record, table, picture = measure_ood(module.to(device), data, estimator, images, seed, batch_size)
    _write(run, "ood", out, {"ood.txt": text + "\n", "ood.json": record, "ood.csv": table, "ood.png": picture})
    print(text)


def flow(
    run: str,
    checkpoint: str = "last",
    images: int = 100,
    steps: int = 50,
    probes: int = 1,
    dequantization: Dequantization = "decoder",
    check: bool = False,
    seed: int = 0,
    batch_size: int = 50,
    device: str = "cpu",
    out: str | None = None,
) -> None:
    """Log-likelihood of test images under the model's probability-flow ODE, in bits/dim.

    A state x_1 of each image is taken to x_T by Runge-Kutta steps equal in log-SNR. The divergence along the way is
    Hutchinson's unbiased estimate from random signs, or exact with --probes 0, which takes C H W backward passes for
    each evaluation of the network. The density becomes bits of grey levels by variational dequantisation with the
    model's own q(x_1 | x_0) and decoder, or by uniform noise. The latter is another model, one that rounds, and asks
    for the density between the grey levels, where a denoiser has seen nothing. Both means are upper bounds on the bits
    of the flow, and no bound on those of the stochastic reverse process.

    The standard error is taken over images. Writes flow.txt and flow.json.

    Args:
        run: folder of the run
        checkpoint: last, best or a file
        images: test images, 2 or more
        steps: steps, of 4 evaluations of the network each
        probes: random signs for each image, 0 for the exact divergence
        dequantization: from density to bits
        check: take twice as many steps as well; what that changes is what the grid costs
        seed: seed of the choice of images and of the noise
        batch_size: images at a time
        device: where to work, cpu or cuda
        out: folder for the results, by default RUN/flow
    """
    at_least(2, images=images)
    at_least(1, batch_size=batch_size)
    at_least(0, probes=probes)
    module, data = Run(run).load(checkpoint)
    chosen = data.split("test").chosen(images, seed)
    text, record = measure_flow(module.to(device), chosen, steps, probes, dequantization, check, seed, batch_size)
    _write(run, "flow", out, {"flow.txt": text + "\n", "flow.json": record})
    print(text)


def forms(
    run: str,
    checkpoint: str = "last",
    T: list[int] | None = None,
    images: int = 32,
    draws: int = 4,
    seed: int = 0,
    device: str = "cpu",
    out: str | None = None,
) -> None:
    """The three forms of the bound on one model: same images, same number of network evaluations.

    Each form is drawn several times for each image over all reverse steps, one network evaluation a step. Its noise is
    the standard deviation over draws at a fixed image, so the spread of the images themselves is not in it. It is given
    twice: as drawn, all steps along one path of the forward process, and as it would be if every step had a draw of its
    own (the root of the summed variances of the steps), which is what a training loss or a subset of steps sees. The
    literal KL is shown apart: it is no term of the bound.

    Writes forms.txt, forms.json and forms.png: for the last T, the steps' cost summed from t = 1 down and each step's
    noise, against t and log SNR.

    Args:
        run: folder of the run
        checkpoint: last, best or a file
        T: numbers of states to evaluate, by default the model's own
        images: test images, 2 or more
        draws: draws for each image, 2 or more
        seed: seed of the draws
        device: where to work, cpu or cuda
        out: folder for the results, by default RUN/forms
    """
    at_least(2, images=images, draws=draws)
    module, data = Run(run).load(checkpoint)
    model = module.to(device).ema_model
    x0 = levels_to_model(data.split("test").images[:images].to(device), module.levels)
    table, rows, picture = compare_forms(model, x0, T or [model.T], draws, seed)
    text = f"{len(x0)} test images, {draws} draws each, averaged weights\n\n{table}"
    _write(run, "forms", out, {"forms.txt": text + "\n", "forms.json": rows, "forms.png": picture})
    print(text)


def variance(
    run: str,
    checkpoint: str = "last",
    images: int = 2000,
    points: int = 40,
    seed: int = 0,
    batch_size: int = 100,
    device: str = "cpu",
    out: str | None = None,
) -> None:
    """Measure the optimal fixed variance of the reverse steps, and write it down as a configuration.

    The mean squared error of the averaged model's eps (clipped where the model clips) is measured on training images at
    noise levels spread over the chain, one network evaluation for each image and level, in float32. AnalyticVariance
    turns it into the variance of every step, of any number of steps.

    Writes analytic.yaml, which is laid over the configuration of the run.

    Args:
        run: folder of the run
        checkpoint: last, best or a file
        images: training images, at most all
        points: noise levels, 2 or more, at most
        seed: seed of the images and of the noise
        batch_size: images at a time
        device: where to work, cpu or cuda
        out: folder for the results, by default RUN/variance
    """
    at_least(1, images=images, batch_size=batch_size)
    module, data = Run(run).load(checkpoint)
    text, overlay = measure_variance(module.to(device), data, images, points, seed, batch_size)
    (path,) = _write(run, "variance", out, {"analytic.yaml": yaml.safe_dump(overlay, sort_keys=False)})
    folder = Run(run).folder
    print(f"{text}\nuse it: ddpm test -c {folder}/config.yaml -c {path} --ckpt_path {checkpoint}")


def export(run: str, to: Format, out: str, checkpoint: str = "last") -> None:
    """Write the averaged model of a run for use elsewhere.

    safetensors   one file, weights and parts: ddpm_lightning.export.load_model(FILE) is the DiffusionModel again
    diffusers     a folder: diffusers' DDPMPipeline.from_pretrained(FOLDER), DDIMPipeline too, with this package
    onnx          the network alone, inputs x, t (and label), for any batch size
    torch_export  the same as a .pt2 of torch.export

    The last two know nothing of the schedule: t is the scalar that the model's conditioning gives its network.

    Args:
        run: folder of the run
        to: format
        out: the file, or for diffusers the folder
        checkpoint: last, best or a file
    """
    path = Path(out).expanduser()
    if path.suffix != SUFFIXES[to]:
        raise InputError(f"--out {out}: the name of {to} ends in {SUFFIXES[to] or 'no suffix: it is a folder'}")
    module = Run(run).load_module(checkpoint)
    classes = module.num_classes if module.class_conditional else None
    if to == "safetensors":
        save_model(module.ema_model, path)
    elif to == "onnx":
        export_onnx(module.ema_model, path, module.shape, classes)
    elif to == "torch_export":
        export_program(module.ema_model, path, module.shape, classes)
    else:
        from ddpm_lightning.export.diffusers import to_pipeline

        pipeline: Any = to_pipeline(module.ema_model, module.shape)
        pipeline.save_pretrained(path)
    print(f"{to}: {path}")


EVALUATIONS: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (quality, ood, flow, forms, variance)
}


def run_command(name: str, args: list[str]) -> None:
    """Run ``ddpm evaluate`` or ``ddpm export``.

    Args:
        name: "evaluate" or "export".
        args: the words after it.

    Raises:
        InputError: bad options, or what a command says of its run.
    """
    if name == "export":
        call(export, args, "ddpm export")
        return
    if args[:1] in ([], ["-h"], ["--help"]):
        lines = [f"  {key:<9} {str(each.__doc__).partition(chr(10))[0]}" for key, each in EVALUATIONS.items()]
        usage = "usage: ddpm evaluate WHAT RUN [options]     (ddpm evaluate WHAT --help shows the options)"
        print("\n".join([usage, "", "Measure a finished run. WHAT is one of", "", *lines]))
        return
    if args[0] not in EVALUATIONS:
        raise InputError(f"evaluate {args[0]}: there are {', '.join(EVALUATIONS)}")
    call(EVALUATIONS[args[0]], args[1:], f"ddpm evaluate {args[0]}")


def _write(run: str, name: str, out: str | None, contents: dict[str, Any]) -> list[Path]:
    """Write results into RUN/name, or the folder ``out``."""
    results = Run(Run(run).folder / name if out is None else out)
    return [results.write(file, content) for file, content in contents.items()]
