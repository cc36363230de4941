"""The weaker model that guides another: found, and refused where the two cannot be compared."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ddpm_lightning.checkpoints.descriptions import describe
from ddpm_lightning.errors import InputError
from ddpm_lightning.process import (
    AutoguidedDenoiser,
    Denoiser,
    DiffusionModel,
    ScoreParameterization,
    TimeConditioning,
)
from ddpm_lightning.runs import Run
from ddpm_lightning.training import DiffusionModule
from ddpm_lightning.training.restored import schedule_marks

__all__ = ["autoguidance", "load_guide"]

_SAME = (
    "shape",
    "levels",
    "scale",
    "class_conditional",
    "num_classes",
    "vector_conditional",
    "vector_size",
    "field_conditional",
    "field_channels",
)
# of gamma: networks are smooth in it, and the ends of a learned schedule move in training
_SLACK = 1.0


def load_guide(
    name: str, module: DiffusionModule, times: Tensor, labels: Sequence[int] | None = None
) -> DiffusionModule:
    """The weaker model of a run or a checkpoint, in evaluation mode on the module's device.

    Args:
        name: a run's folder, whose last checkpoint is taken, or a checkpoint file.
        module: the model that is to be guided.
        times: float64 ``[K]``, at which its denoiser will be asked.
        labels: the classes that it will be asked for.

    Raises:
        InputError: neither, or a guide that does not fit: other data or conditions, an encoder or pixelwise noise, a
            network that knows another schedule only, noise that the guide never saw.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise InputError(f"--guide {name} does not exist: give the folder of a run or a checkpoint of a weaker model")
    try:
        run, which = (path, "last") if path.is_dir() else (path.parent, path)
        guide = Run(run).load_diffusion(which)
        _check_data(guide, module)
        _check_noise(guide.ema_model, module.ema_model, times)
        if guide.label_dropout == 0 and guide.num_classes in (labels or []):
            raise InputError(f"it never saw an image without its class, and --labels asks for {guide.num_classes}")
    except InputError as error:
        raise InputError(f"--guide {name}: {error}") from error
    return guide.to(module.device)


def autoguidance(guide: DiffusionModule, scale: float) -> Callable[[Denoiser], Denoiser]:
    """What wraps a model's denoiser (``DiffusionModel.with_denoiser``). The guide's network is asked at the same gamma,
    in the units of the model's x_t, whatever its own schedule."""
    network = guide.ema_model.denoiser
    return lambda denoiser: AutoguidedDenoiser(denoiser, network.under(denoiser.schedule), scale)


def _check_data(guide: DiffusionModule, module: DiffusionModule) -> None:
    for name in _SAME:
        theirs, ours = (describe(each.hparams.get(name)) for each in (guide, module))
        if theirs != ours:
            raise InputError(f"its {name} is {theirs} and the model's is {ours}: take a model of the same data")


def _check_noise(weak: DiffusionModel, strong: DiffusionModel, times: Tensor) -> None:
    if not (weak.has_plain_process and strong.has_plain_process):
        raise InputError("a guide is for models with a fixed encoder and one noise level for all pixels")
    network, theirs, ours = weak.denoiser, schedule_marks(weak), schedule_marks(strong)
    same = theirs["name"] == ours["name"] and np.allclose(theirs["gamma"], ours["gamma"], rtol=1e-6, atol=1e-6)
    kinds = TimeConditioning, ScoreParameterization
    tied = [type(part).__name__ for part in (network.conditioning, network.parameterization) if isinstance(part, kinds)]
    if tied and not same:
        raise InputError(
            f"its schedule is {theirs['name']} of T = {theirs['T']} and the model's {ours['name']} of T = {ours['T']}, "
            f"and {tied[0]} ties its network to its own: take a model of the same schedule"
        )
    seen, asked = weak.schedule.gamma(weak.grid[1:]), strong.schedule.gamma(times)
    if asked.min() < seen.min() - _SLACK or asked.max() > seen.max() + _SLACK:
        raise InputError(
            f"it was trained at gamma from {float(seen.min()):.3g} to {float(seen.max()):.3g} and would be asked from "
            f"{float(asked.min()):.3g} to {float(asked.max()):.3g}: take a model that was trained on these noise levels"
        )
