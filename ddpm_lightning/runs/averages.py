"""Snapshots of power-function averages in a run's folder, and the averaged models made from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.checkpoints.files import AtomicCheckpointIO, read_checkpoint
from ddpm_lightning.checkpoints.weights import check_finite, check_state
from ddpm_lightning.errors import InputError
from ddpm_lightning.runs.run import Run
from ddpm_lightning.training.power_average import exponent, fit_profile

__all__ = ["STATE_KEY", "Snapshots", "average"]

STATE_KEY = "PowerAverages"
"""Name under which a checkpoint holds the averages at its own step."""

Averages = Mapping[str, Mapping[str, Tensor]]
"""State dicts of averaged models by their sigma_rel, as text."""

# what training goes on from
_OF_TRAINING = ("loops", "callbacks", "optimizer_states", "lr_schedulers", "resume")
_LARGEST_ERROR = 0.1


class Snapshots:
    """The files RUN/checkpoints/averages-STEP.pt of a run."""

    def __init__(self, run: Run) -> None:
        self.folder = run.checkpoints

    def steps(self) -> list[int]:
        """Steps of the snapshots, in order."""
        names = (path.stem.partition("-")[2] for path in self.folder.glob("averages-*.pt"))
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"averages-{step}.pt"

    def write(self, step: int, averages: Averages) -> None:
        """Write a snapshot whole, or raise RunError."""
        state = {f"{width}/{name}": value for width, average in averages.items() for name, value in average.items()}
        AtomicCheckpointIO().save_checkpoint({"state_dict": state, "global_step": step}, self.path(step))

    def read(self, step: int) -> dict[str, dict[str, Tensor]]:
        """The averages of a snapshot; InputError for a damaged file."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in read_checkpoint(self.path(step))["state_dict"].items():
            width, _, name = name.partition("/")
            found.setdefault(width, {})[name] = value
        return found

    def keep(self, steps: range) -> None:
        """Delete the snapshots of all other steps."""
        for step in self.steps():
            if step not in steps:
                self.path(step).unlink(missing_ok=True)


def average(run: str, sigma_rel: float, checkpoint: str = "last") -> dict[str, Any]:
    """Average the weights over another part of training, after training.

    The run must have been trained with the callback PowerAverages, whose snapshots are combined (Karras et al. 2023,
    arXiv 2312.02696, section 3). sigma_rel is the standard deviation of the time that is averaged over, in units of the
    length of training: 0.05 and 0.1 are kept; 0.03 to 0.2 are made of them, and the error is printed.

    Writes RUN/checkpoints/ema-SIGMA.ckpt, a checkpoint that every command but fit takes as --ckpt_path or --checkpoint.

    Args:
        run: folder of the run
        sigma_rel: relative width of the average
        checkpoint: last, best or a file; the average ends at its step
    """
    gamma, folder = exponent(sigma_rel), Run(run)
    path = folder.checkpoint(checkpoint)
    saved = read_checkpoint(path)
    step, own = saved.get("global_step", 0), _averages_of(path, saved)
    snapshots = Snapshots(folder)
    steps = [each for each in snapshots.steps() if each < step]
    widths = [exponent(float(width)) for width in own]
    times = np.repeat([*steps, step], len(own)).astype(np.float64)
    weights, error = fit_profile(times, np.tile(widths, len(steps) + 1), step, gamma)
    if error > _LARGEST_ERROR:
        raise InputError(
            f"sigma_rel = {sigma_rel:g} cannot be made of {len(times)} averages of widths {', '.join(own)}: the error "
            f"is {error:.0%} of the profile; choose a width nearer to these, or train with more snapshots"
        )
    parts = iter(weights.tolist())
    combined = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in next(iter(own.values())).items()}
    for each in [*steps, None]:
        found = own if each is None else snapshots.read(each)
        for width, first in own.items():
            if each is not None:
                check_state(f"snapshot {snapshots.path(each)}", first, found.get(width, {}))
            weight = next(parts)
            for name, value in combined.items():
                value.add_(found[width][name], alpha=weight)
    state = saved["state_dict"]
    for name, value in next(iter(own.values())).items():
        # counters are no averages
        state[f"ema_model.{name}"] = combined[name].to(value.dtype) if value.is_floating_point() else value
    result = {name: value for name, value in saved.items() if name not in _OF_TRAINING}
    out = folder.checkpoints / f"ema-{sigma_rel:g}.ckpt"
    AtomicCheckpointIO().save_checkpoint({**result, "sigma_rel": sigma_rel}, out)
    print(f"{out}: the average of sigma_rel {sigma_rel:g} at step {step}, from {len(times)} averages; its profile is")
    print(f"off by {error:.2g} of its norm. Take it as --ckpt_path {out}")
    return {"path": str(out), "sigma_rel": sigma_rel, "step": step, "error": error}


def _averages_of(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The averages that a checkpoint holds; they are checked against its averaged model."""
    callbacks = checkpoint.get("callbacks")
    kept = callbacks.get(STATE_KEY) if isinstance(callbacks, Mapping) else None
    averages = kept.get("averages") if isinstance(kept, Mapping) else None
    if not averages or checkpoint.get("global_step", 0) < 1:
        raise InputError(
            f"{path} holds no averages: train with -c configs/overlays/power_averages.yaml, and give a checkpoint "
            "that fit has written"
        )
    head = "ema_model."
    model = {
        name.removeprefix(head): value for name, value in checkpoint["state_dict"].items() if name.startswith(head)
    }
    try:
        for width, each in averages.items():
            exponent(float(width))
            check_finite(model, each)
            check_state("averages", model, each)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its averages are damaged ({error}): take another checkpoint") from error
    return {width: dict(each) for width, each in averages.items()}
