"""What a checkpoint must hold for a training run to go on from it."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpm_lightning.checkpoints.weights import is_finite, is_plain_tensor
from ddpm_lightning.errors import InputError

__all__ = ["check_training_state"]

_NEEDED = {"loops": dict, "optimizer_states": list, "lr_schedulers": list, "global_step": int, "epoch": int}


def check_training_state(
    module: LightningModule, trainer: Trainer, checkpoint: Mapping[str, Any], scheduler_changes: bool = False
) -> None:
    """Refuse a checkpoint from which training cannot go on, before anything of it is restored.

    Above all the optimiser's state: a fused optimiser goes through the memory of weight and state side by side, and a
    state of another shape crashes the process. Where ``scheduler_changes``, that of the scheduler is not restored.

    Raises:
        InputError: something is missing, or has another form than the trainer, its callbacks, the optimiser or the
            learning-rate scheduler need.
    """
    for name, kind in _NEEDED.items():
        value = checkpoint.get(name)
        if value is None:
            raise _unfit("", f"lacks {name}")
        if type(value) is not kind:
            raise _unfit(name, f"is {str(value)[:40]!r}")
    _check_form("loops", {"fit_loop": trainer.fit_loop.state_dict()}, checkpoint["loops"], counts=True)
    loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    if not isinstance(loaders, list) or len(loaders) > 1 or not all(isinstance(loader, Mapping) for loader in loaders):
        raise _unfit("loops.fit_loop", "has another combined_loader than that of one data set")
    optimizers, schedulers = _init_optimizers_and_lr_schedulers(module)
    made: dict[str, list[Any]] = {"optimizer_states": optimizers}
    if not scheduler_changes:
        made["lr_schedulers"] = schedulers
    for name, parts in made.items():
        if len(parts) != len(checkpoint[name]):
            raise InputError(
                f"the checkpoint has {len(checkpoint[name])} {name} and this run has {len(parts)}: "
                "use the configuration that was saved beside it: -c RUN/config.yaml"
            )
    for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        _check_optimizer(module, optimizer, state, checkpoint["state_dict"], scheduler_changes)
    for config, state in zip(made.get("lr_schedulers", []), checkpoint["lr_schedulers"], strict=not scheduler_changes):
        _check_form("lr_schedulers", config.scheduler.state_dict(), state, exact=True)
        _try("lr_schedulers", config.scheduler.load_state_dict, state)
    _check_callbacks(trainer, checkpoint.get("callbacks") or {})


def _unfit(place: str, difference: str) -> InputError:
    whose = f"the checkpoint's {place}" if place else "the checkpoint"
    return InputError(f"{whose} {difference}: it can be evaluated, but training cannot go on from it")


def _try(place: str, restore: Callable[[Any], Any], state: Any) -> None:
    """Do to a copy what Lightning is going to do."""
    try:
        with warnings.catch_warnings(action="ignore"):
            restore(state)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise _unfit(place, f"cannot be restored ({type(error).__name__}: {reason[:200]})") from error


def _check_callbacks(trainer: Trainer, states: Any) -> None:
    _check_form("callbacks", {}, states)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's connectors set it
        state = states.get(callback.state_key)
        if state is None:
            continue
        place = f"callbacks, {type(callback).__name__},"
        _check_form(place, {}, state)
        _check_form(place, {name: value for name, value in callback.state_dict().items() if name in state}, state)
        # Lightning deletes the file of a checkpoint that is among the best no more
        strange = [word for word in _words(state) if "://" in word or ".." in Path(word).parts]
        if strange and "://" not in trainer.default_root_dir:
            raise _unfit(place, f"names the file {strange[0][:80]!r}")
        _try(place, copy(callback).load_state_dict, deepcopy(state))


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in (*value, *value.values()) if isinstance(value, Mapping) else value:
            yield from _words(item)


def _check_optimizer(
    module: nn.Module, optimizer: Optimizer, state: Any, weights: Mapping[str, Any], scheduler_changes: bool
) -> None:
    place, names = "optimizer_states", {parameter: name for name, parameter in module.named_parameters()}
    fresh, groups = copy(optimizer), optimizer.state_dict()["param_groups"]
    _check_form(place, {"state": {}, "param_groups": [{"params": group["params"]} for group in groups]}, state)
    _try(place, optimizer.load_state_dict, state)
    # another scheduler's settings (initial_lr, ...) are not there; torch adds those that an older one did not write
    own = [
        {name: group[name] for name in group if name in optimizer.defaults or not scheduler_changes} for group in groups
    ]
    _check_form(f"{place}.param_groups", own, optimizer.state_dict()["param_groups"])
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(set(numbers)) < len(numbers) or not state["state"].keys() <= set(numbers):
        raise _unfit(place, "numbers other weights than it has")
    parameters = [(i, parameter) for i, group in enumerate(fresh.param_groups) for parameter in group["params"]]
    for number, (group, parameter) in zip(numbers, parameters, strict=True):
        name, example = names[parameter], _state_after_a_step(fresh, group, parameter)
        if example and _state_after_a_step(optimizer, group, parameter) is None:
            raise _unfit(f"{place}.param_groups", "holds settings with which this optimiser cannot take a step")
        if number in state["state"]:
            _check_form(f"{place}, {name},", example or {}, state["state"][number])
        elif example and _has_moved(weights.get(name), weights.get(f"ema_{name}")):
            raise _unfit(place, f"lacks the state of {name}")


def _state_after_a_step(optimizer: Optimizer, group: int, parameter: Tensor) -> dict[str, Any] | None:
    """State of a weight like ``parameter`` after a step along 0; None of an optimiser that cannot take one so."""
    weight = nn.Parameter(torch.zeros(parameter.shape))
    weight.grad = torch.zeros_like(weight)
    probe = copy(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**optimizer.param_groups[group], "params": [weight]}]
    try:
        probe.step()
    except Exception:
        return None
    return dict(probe.state[weight]) if is_finite(weight) else None


def _has_moved(weight: Any, average: Any) -> bool:
    """Whether a weight was ever trained; one that takes no part in the loss is what its average is."""
    both = is_plain_tensor(weight) and is_plain_tensor(average) and weight.shape == average.shape
    return both and not torch.equal(weight, average)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "number" if is_plain_tensor(value) and value.dim() == 0 else "tensor"
    kinds = {"bool": bool, "number": int | float, "list": list | tuple, "mapping": Mapping}
    return next((kind for kind, types in kinds.items() if isinstance(value, types)), type(value).__name__)


def _check_form(place: str, mine: Any, theirs: Any, counts: bool = False, exact: bool = False) -> None:
    """Compare names, kinds, lengths and shapes with what this run has before it is restored.

    None, and an empty list, stand for what is not known yet. ``counts`` are whole numbers; where the form is ``exact``,
    no names may be added.
    """
    kind = _kind(mine)
    if mine is None or (theirs is None and kind not in ("mapping", "tensor")):
        return
    if kind != _kind(theirs):
        raise _unfit(place, f"is of type {type(theirs).__name__} instead of {type(mine).__name__}")
    if kind == "list":
        if mine and len(mine) != len(theirs):
            raise _unfit(place, f"has {len(theirs)} values instead of {len(mine)}")
        mine, theirs = ({str(i): value for i, value in enumerate(values)} for values in (mine, theirs))
    if isinstance(mine, Mapping):
        exact |= place.endswith("progress")
        # what lies in the state_dict of a loop depends on how far the run has come
        names = [name for name in mine if name in theirs or not place.endswith("state_dict")]
        for name in names:
            if name not in theirs:
                raise _unfit(place, f"lacks {name}")
            _check_form(f"{place}.{name}", mine[name], theirs[name], counts, exact)
        if strange := [name for name in theirs if exact and name not in mine]:
            raise _unfit(place, f"has {strange[0]!r}, which this run lacks")
    if kind == "tensor" and not is_plain_tensor(theirs):
        raise _unfit(place, "is no plain tensor")
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        if theirs.shape != mine.shape:
            raise _unfit(place, f"is of shape {list(theirs.shape)} instead of {list(mine.shape)}")
        # an infinite score of a callback is not known yet, nor is its type
        if is_finite(mine) and theirs.is_floating_point() != mine.is_floating_point():
            raise _unfit(place, f"is of {theirs.dtype}")
    if kind in ("number", "tensor"):
        if counts and type(theirs) is not int:
            raise _unfit(place, f"is {theirs}")
        if not _is_finite(theirs) and (_is_finite(mine) or torch.as_tensor(theirs).isnan().any()):
            raise _unfit(place, "is not finite")


def _is_finite(value: Tensor | float) -> bool:
    return is_finite(value) if isinstance(value, Tensor) else abs(value) < float("inf")
