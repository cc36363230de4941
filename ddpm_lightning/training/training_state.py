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

from ddpm_lightning.errors import InputError
from ddpm_lightning.training.checks import is_finite, is_plain_tensor

__all__ = ["check_training_state"]

_NEEDED = {"loops": dict, "optimizer_states": list, "lr_schedulers": list, "global_step": int, "epoch": int}
# sizes that tell the dimensions of an example weight apart
_EXAMPLE = (2, 3, 5, 7, 11, 13)


def check_training_state(
    module: LightningModule, trainer: Trainer, checkpoint: Mapping[str, Any], scheduler_changes: bool = False
) -> None:
    """Refuse a checkpoint from which training cannot go on, before anything of it is restored.

    Above all the optimiser's state: a fused optimiser goes through the memory of weight and state side by side, and a
    state of another shape crashes the process.

    Args:
        module: the module, attached to the trainer.
        trainer: what is about to restore the checkpoint.
        checkpoint: as it was read.
        scheduler_changes: the learning-rate scheduler is another one, whose state is not restored.

    Raises:
        InputError: something is missing, or has another form than the trainer, its callbacks, the optimiser or the
            learning-rate scheduler need.
    """
    for name, kind in _NEEDED.items():
        value = checkpoint.get(name)
        if value is None:
            raise InputError(f"the checkpoint lacks {name}: it can be evaluated, but training cannot go on from it")
        if type(value) is not kind:
            raise _unfit(name, f"is {str(value)[:40]!r}")
    _check_form("loops", {"fit_loop": trainer.fit_loop.state_dict()}, checkpoint["loops"], recurse=True)
    optimizers, schedulers = _init_optimizers_and_lr_schedulers(module)
    if scheduler_changes:
        schedulers = []
    for name, made in (("optimizer_states", optimizers), ("lr_schedulers", schedulers)):
        if scheduler_changes and name == "lr_schedulers":
            continue
        if len(made) != len(checkpoint[name]):
            raise InputError(
                f"the checkpoint has {len(checkpoint[name])} {name} and this run has {len(made)}: "
                "use the configuration that was saved beside it: -c RUN/config.yaml"
            )
    # before the schedulers change the optimisers' steps
    for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        _check_optimizer(module, optimizer, state, checkpoint["state_dict"])
    for config, state in zip(schedulers, checkpoint["lr_schedulers"], strict=not scheduler_changes):
        mine = config.scheduler.state_dict()
        _check_form("lr_schedulers", mine, state)
        if strange := [name for name in state if name not in mine]:
            raise _unfit("lr_schedulers", f"has {strange[0]!r}, which this scheduler lacks")
        _restore("lr_schedulers", config.scheduler.load_state_dict, state)
    _check_callbacks(trainer, checkpoint.get("callbacks") or {})


def _unfit(place: str, difference: str) -> InputError:
    return InputError(f"the checkpoint's {place} {difference}: it can be evaluated, but training cannot go on from it")


def _restore(place: str, restore: Callable[[Any], Any], state: Any) -> None:
    """Try on a copy what Lightning is going to do."""
    try:
        with warnings.catch_warnings(action="ignore"):
            restore(state)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise _unfit(place, f"cannot be restored ({type(error).__name__}: {reason[:200]})") from error


def _check_callbacks(trainer: Trainer, states: Any) -> None:
    if not isinstance(states, Mapping):
        raise _unfit("callbacks", f"is a {type(states).__name__}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning's connectors set it
        state = states.get(callback.state_key)
        if state is None:
            continue
        place = f"callbacks, {type(callback).__name__},"
        if not isinstance(state, Mapping):
            raise _unfit(place, f"is a {type(state).__name__}")
        mine = callback.state_dict()
        _check_form(place, {name: value for name, value in mine.items() if name in state}, state)
        # Lightning deletes the file of a checkpoint that is among the best no more
        strange = [word for word in _words(state) if "://" in word or ".." in Path(word).parts]
        if strange and "://" not in trainer.default_root_dir:
            raise _unfit(place, f"names the file {strange[0][:80]!r}")
        _restore(place, copy(callback).load_state_dict, deepcopy(state))


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in (*value, *value.values()) if isinstance(value, Mapping) else value:
            yield from _words(item)


def _check_optimizer(module: nn.Module, optimizer: Optimizer, state: Any, weights: Mapping[str, Any]) -> None:
    place = "optimizer_states"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {parameter: name for name, parameter in module.named_parameters()}
    examples = {dim: _state_after_a_step(optimizer, dim) for dim in {parameter.dim() for parameter in parameters}}
    lengths = [{"params": [0] * len(group["params"])} for group in optimizer.param_groups]
    settings = [{name: v for name, v in group.items() if name != "params"} for group in optimizer.param_groups]
    _check_form(place, {"state": {}, "param_groups": lengths}, state)
    for number, mine in enumerate(lengths):
        _check_form(f"{place}.param_groups", mine, state["param_groups"][number])
    _restore(place, optimizer.load_state_dict, state)
    for number, mine in enumerate(settings):
        _check_form(f"{place}.param_groups", mine, optimizer.param_groups[number])
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(set(numbers)) < len(numbers) or not state["state"].keys() <= set(numbers):
        raise _unfit(place, "numbers other weights than it has")
    known = {dim: example for dim, example in examples.items() if example}
    if any(_state_after_a_step(optimizer, dim) is None for dim in known):
        raise _unfit(f"{place}.param_groups", "holds settings with which this optimiser cannot take a step")
    for number, parameter in zip(numbers, parameters, strict=True):
        name, example = names[parameter], known.get(parameter.dim(), {})
        if number in state["state"]:
            _check_weight_state(f"{place}, {name},", parameter, state["state"][number], example)
        elif example and _has_moved(weights.get(name), weights.get(f"ema_{name}")):
            raise _unfit(place, f"lacks the state of {name}")


def _state_after_a_step(optimizer: Optimizer, dim: int) -> dict[str, Any] | None:
    """State of a weight of ``dim`` dimensions after a step along 0; None of an optimiser that cannot take one so."""
    weight = nn.Parameter(torch.zeros(_EXAMPLE[:dim]))
    weight.grad = torch.zeros_like(weight)
    probe = copy(optimizer)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**optimizer.param_groups[0], "params": [weight]}]
    try:
        probe.step()
    except Exception:
        return None
    return dict(probe.state[weight]) if is_finite(weight) else None


def _check_weight_state(place: str, parameter: Tensor, state: Any, example: Mapping[str, Any]) -> None:
    """Compare one weight's state with that of the example weight."""
    _check_form(place, example, state)
    for name, value in example.items():
        if value is None:
            continue
        theirs = torch.as_tensor(state[name]) if isinstance(state[name], int | float) else state[name]
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if len(shape) == parameter.dim():
            sizes = zip(shape, _EXAMPLE, parameter.shape, strict=False)
            shape = tuple(size if own == whole else own for own, whole, size in sizes)
        if not is_plain_tensor(theirs):
            raise _unfit(place, f"has {name} that is no plain tensor")
        if tuple(theirs.shape) != shape:
            raise _unfit(place, f"has {name} of shape {list(theirs.shape)} instead of {list(shape)}")
        is_number = isinstance(state[name], int | float)
        if isinstance(value, Tensor) and not is_number and theirs.is_floating_point() != value.is_floating_point():
            raise _unfit(place, f"has {name} of {theirs.dtype}")
        if not is_finite(theirs):
            raise _unfit(place, f"has {name} that is not finite")


def _has_moved(weight: Any, average: Any) -> bool:
    """Whether a weight was ever trained; one that takes no part in the loss is what its average is."""
    both = is_plain_tensor(weight) and is_plain_tensor(average) and weight.shape == average.shape
    return both and not torch.equal(weight, average)


def _form(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float) or (is_plain_tensor(value) and value.dim() == 0):
        return "number"
    if isinstance(value, list | tuple):
        return "list"
    return "mapping" if isinstance(value, Mapping) else type(value).__name__


def _check_form(place: str, mine: Mapping[Any, Any], theirs: Any, recurse: bool = False) -> None:
    """Compare names and kinds of values; None stands for a value that is not known yet."""
    if not isinstance(theirs, Mapping):
        raise _unfit(place, f"is a {type(theirs).__name__}")
    for name, value in mine.items():
        if name not in theirs:
            raise _unfit(place, f"lacks {name}")
        other = theirs[name]
        if recurse and isinstance(value, Mapping):
            _check_form(f"{place}.{name}", value, other, recurse)
            if strange := [key for key in other if key not in value and name.endswith("progress")]:
                raise _unfit(f"{place}.{name}", f"has {strange[0]!r}, which is no counter")
        elif value is not None and other is not None:
            if _form(value) != _form(other):
                raise _unfit(place, f"has {name} of type {type(other).__name__} instead of {type(value).__name__}")
            if isinstance(value, list | tuple) and len(value) != len(other):
                raise _unfit(place, f"has {len(other)} {name} instead of {len(value)}")
            if _form(other) == "number" and (other != other or (recurse and type(other) is not int)):
                raise _unfit(place, f"has {name} {other}")
            if isinstance(value, list | tuple):
                _check_form(f"{place}.{name}", dict(enumerate(value)), dict(enumerate(other)))
