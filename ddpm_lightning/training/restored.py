"""What is asked of a module against what its checkpoint says: each change is applied or refused.

Lightning restores the optimiser and the learning-rate scheduler with the values that they had, whatever the
configuration says now, and the weights into any model that has tensors of the same shapes.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ddpm_lightning.errors import InputError
from ddpm_lightning.process import DiffusionModel, TimeConditioning

__all__ = [
    "Changes",
    "apply_optimization",
    "changed_options",
    "check_schedule",
    "in_words",
    "keep_callback_options",
    "refuse_changes",
    "schedule_marks",
]

# what the weights mean; a network may be given another dropout
_MEANING = (
    "network",
    "hierarchy",
    "encoder",
    "parameterization",
    "conditioning",
    "class_conditional",
    "vector_conditional",
    "field_conditional",
    "num_classes",
    "shape",
    "levels",
    "scale",
)
_FREE = {"dropout"}
# switched on or off, an optimiser has other moments
_MOMENTS = ("optimizer.amsgrad", "optimizer.centered", "optimizer.momentum")
_MISSING = object()

Changes = dict[str, tuple[Any, Any]]
"""By dotted name of an argument of the module: its value in the checkpoint, and the one asked for."""


def changed_options(asked: Mapping[str, Any], restored: Mapping[str, Any]) -> Changes:
    """Hyper-parameters, as plain data, that are not those of the checkpoint. What only one has is not compared."""
    names = [name for name in asked if name in restored and not name.startswith("_")]
    return dict(change for name in names for change in _differences(name, _full(restored[name]), _full(asked[name])))


def refuse_changes(changes: Changes, training: bool) -> None:
    """Refuse, with an InputError, weights in a model for which they were not trained.

    In ``training`` also an optimiser that cannot use the saved moments, or needs others.
    """
    for path, (before, now) in changes.items():
        switched = path in _MOMENTS and bool(before) != bool(now)
        if path.partition(".")[0] in _MEANING and path.rpartition(".")[2] not in _FREE:
            why = "its weights fit that only"
        elif training and (path == "optimizer" or switched):
            why = "training cannot go on from its moments"
        else:
            continue
        raise InputError(
            f"--model.{path} {_short(now)}: the checkpoint was trained with {_short(before)}, and {why}. "
            "Leave the option out, or train another run"
        )


def keep_callback_options(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Have early stopping keep the patience that it is asked for, which its saved state would replace."""
    for callback in trainer.early_stopping_callbacks:
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if isinstance(callback, EarlyStopping) and isinstance(state, dict):
            state["patience"] = callback.patience


def apply_optimization(module: LightningModule, trainer: Trainer, changes: Changes) -> None:
    """Give the restored optimiser the options that are asked for, and the learning rate that its scheduler would have
    now if it had been asked for from the start. The optimiser's moments stay.

    Raises:
        InputError: a scheduler that is over before the step that training goes on from.
    """
    if not any(path.partition(".")[0] in ("optimizer", "lr_scheduler") for path in changes):
        return
    (fresh,), schedulers = _init_optimizers_and_lr_schedulers(module)
    # it follows what was measured: it goes on from the rate there is, and counts anew
    on_plateau = any(isinstance(config.scheduler, ReduceLROnPlateau) for config in schedulers)
    kept = {"lr"} if on_plateau and "optimizer.lr" not in changes else set()
    for scheduler in (config.scheduler for config in schedulers if not on_plateau):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
            for step in range(trainer.global_step):
                try:
                    scheduler.step()
                except ValueError as error:
                    raise InputError(
                        f"--model.lr_scheduler {type(scheduler).__name__} ends at step {step}, and training goes on "
                        f"from step {trainer.global_step} ({error}): make it longer"
                    ) from error
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(scheduler.state_dict())
    for group, asked in zip(trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
        group.update({name: value for name, value in asked.items() if name not in {"params", *kept}})


def in_words(changes: Changes) -> str:
    """The changes in one line."""
    return ", ".join(f"{path} {_short(before)} -> {_short(now)}" for path, (before, now) in changes.items())


def _full(description: Any) -> Any:
    """A description in which every class has its own name and all its arguments, so that two can be compared."""
    if isinstance(description, list | tuple):
        return [_full(item) for item in description]
    if not isinstance(description, Mapping):
        return description
    if "class_path" not in description:
        return {key: _full(item) for key, item in description.items()}
    path, given = description["class_path"], {**description.get("init_args", {}), **description.get("dict_kwargs", {})}
    module, _, name = path.rpartition(".")
    # a class that is asked for has been imported; another one differs by its name
    cls = getattr(sys.modules.get(module), name, None)
    if isinstance(cls, type):
        path = f"{cls.__module__}.{cls.__qualname__}"
        defaults = {p.name: p.default for p in signature(cls).parameters.values() if p.default is not Parameter.empty}
        given = {**defaults, **given}
    return {"class_path": path, "init_args": _full(given)}


def _differences(path: str, before: Any, now: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if before.get("class_path") != now.get("class_path"):
            yield path, (before, now)
            return
        arguments = (before.get("init_args", before), now.get("init_args", now))
        for key in dict.fromkeys([*arguments[0], *arguments[1]]):
            yield from _differences(f"{path}.{key}", *(values.get(key, _MISSING) for values in arguments))
    elif before != now and _MISSING not in (before, now):
        yield path, (before, now)


def _short(value: Any) -> str:
    """A part by its class's name, anything else as it is."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    is_part = isinstance(value, Mapping) and "class_path" in value
    return value["class_path"].rpartition(".")[2] if is_part else str(value)


def schedule_marks(model: DiffusionModel) -> dict[str, Any]:
    """What a checkpoint notes of its schedule, as plain data: its name, T, and gamma at ten times."""
    schedule = model.schedule
    device = next((p.device for p in schedule.parameters()), torch.device("cpu"))
    t = torch.linspace(0.1, 1, 10, dtype=torch.float64, device=device)
    with torch.no_grad():
        return {"name": type(schedule).__name__, "T": schedule.T, "gamma": schedule.mean_gamma(t).tolist()}


def check_schedule(model: DiffusionModel, theirs: Any) -> None:
    """A network that is told gamma may be evaluated under another schedule; one that is told the time may not.

    Raises:
        InputError: ``theirs`` are not the :func:`schedule_marks` of this model.
    """
    if model.schedule.is_learned or not isinstance(model.denoiser.conditioning, TimeConditioning):
        return
    mine = schedule_marks(model)
    gamma: Any = theirs.get("gamma") if isinstance(theirs, Mapping) else None
    numbers = isinstance(gamma, list) and all(type(value) is float for value in gamma)
    if not numbers or len(gamma) != len(mine["gamma"]) or not {"name", "T"} <= theirs.keys():
        raise InputError("the checkpoint's note of its schedule is damaged: take another checkpoint")
    if not np.allclose(mine["gamma"], gamma, rtol=1e-6, atol=1e-6):
        raise InputError(
            f"the checkpoint was trained under another schedule, {theirs['name']} of T = {theirs['T']}, than this "
            f"{mine['name']} of T = {mine['T']}, and TimeConditioning tells its network the time, not the noise: "
            "take the configuration saved beside it, and T of a bound or steps of a sampler for fewer steps"
        )
