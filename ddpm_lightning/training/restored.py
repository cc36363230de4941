"""Options of a resumed run against those of its checkpoint: each change is applied or refused.

Lightning restores the optimiser and the learning-rate scheduler with the values that they had, whatever the
configuration says now, and the weights into any model that has tensors of the same shapes.
"""

import sys
import warnings
from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ddpm_lightning.errors import InputError

__all__ = [
    "Changes",
    "apply_optimization",
    "changed_options",
    "in_words",
    "keep_callback_options",
    "refuse_another_optimizer",
    "refuse_changed_weights",
]

# what the weights mean; a network may be given another dropout
_MEANING = ("network", "parameterization", "conditioning", "class_conditional", "num_classes", "shape", "levels")
_FREE = {"dropout"}
# switched on or off, an optimiser has other moments
_MOMENTS = ("optimizer.amsgrad", "optimizer.centered", "optimizer.momentum")
_MISSING = object()

Changes = dict[str, tuple[Any, Any]]
"""By dotted name of an argument of the module: its value in the checkpoint, and the one asked for."""


def changed_options(asked: Mapping[str, Any], restored: Mapping[str, Any]) -> Changes:
    """The arguments of a module that differ from those of its checkpoint.

    Args:
        asked: hyper-parameters of the module, as plain data.
        restored: those in the checkpoint. What only one of the two names is not compared.
    """
    names = [name for name in asked if name in restored and not name.startswith("_")]
    return {
        path: values for name in names for path, values in _differences(name, _full(restored[name]), _full(asked[name]))
    }


def refuse_changed_weights(changes: Changes) -> None:
    """Refuse weights in a model for which they were not trained.

    Raises:
        InputError: naming the option.
    """
    for path, (before, now) in changes.items():
        first, _, last = path.partition(".")
        if first in _MEANING and last.rpartition(".")[2] not in _FREE:
            raise InputError(
                f"--model.{path} {_short(now)}: the checkpoint was trained with {_short(before)}, and its weights fit "
                "that only. Leave the option out, or train another run"
            )


def refuse_another_optimizer(changes: Changes) -> None:
    """Refuse to go on with an optimiser that cannot use the saved moments, or needs others.

    Raises:
        InputError: naming the option.
    """
    for path, (before, now) in changes.items():
        switched = path in _MOMENTS and bool(before) != bool(now)
        if path == "optimizer" or switched:
            raise InputError(
                f"--model.{path} {_short(now)}: the checkpoint was trained with {_short(before)}, and training cannot "
                "go on from its moments. Leave the option out, or train another run"
            )


def keep_callback_options(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Have early stopping keep the patience that it is asked for, which its saved state would replace."""
    for callback in trainer.early_stopping_callbacks:
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if isinstance(callback, EarlyStopping) and isinstance(state, dict):
            state["patience"] = callback.patience


class _Optimized(Protocol):
    """What is asked of a module."""

    def make_optimizer(self) -> Optimizer: ...

    def make_scheduler(self, optimizer: Optimizer) -> LRScheduler | None: ...


def apply_optimization(module: _Optimized, trainer: Trainer, changes: Changes) -> None:
    """Give the restored optimiser the options that are asked for, and the learning rate that its scheduler would have
    now if it had been asked for from the start. The optimiser's moments stay.

    To be called when training starts. The scheduler's state must not have been restored if the scheduler changed.

    Args:
        module: makes optimiser and scheduler as asked for.
        trainer: has the restored ones.
        changes: of :func:`changed_options`; nothing happens where optimiser and scheduler are the same.

    Raises:
        InputError: a scheduler that is over before the step that training goes on from.
    """
    if not any(path.partition(".")[0] in ("optimizer", "lr_scheduler") for path in changes):
        return
    fresh = module.make_optimizer()
    scheduler = module.make_scheduler(fresh)
    if scheduler is not None:
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
        group.update({name: value for name, value in asked.items() if name != "params"})


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
    defaults: dict[str, Any] = {}
    if isinstance(cls, type):
        path = f"{cls.__module__}.{cls.__qualname__}"
        defaults = {p.name: p.default for p in signature(cls).parameters.values() if p.default is not Parameter.empty}
    return {"class_path": path, "init_args": {key: _full(item) for key, item in {**defaults, **given}.items()}}


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
    return (
        value["class_path"].rpartition(".")[2] if isinstance(value, Mapping) and "class_path" in value else str(value)
    )
