"""Numbers of a configuration that make no sense, whichever class they belong to."""

import math
from collections.abc import Iterator, Mapping
from inspect import Parameter
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from ddpm_lightning.checkpoints.descriptions import parameters_of
from ddpm_lightning.errors import InputError

__all__ = ["PARTS", "check_numbers", "leaves"]

_SEEDS = ("seed", "eval_seed", "seed_everything", "interpolate_to")
_LARGEST_SEED = 2**32 - 1  # torch's CPU generator tells no more apart
_LARGEST = 2**63 - 1

_FROM_THE_DATA = ("channels", "levels", "num_classes", "out_channels", "shape")  # filled in later

# least value of Lightning's numbers, which Lightning itself accepts in silence or stumbles over
_LEAST: dict[str, float] = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "limit_val_batches": 0,
    "log_every_n_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "overfit_batches": 0,
    "fast_dev_run": 0,
    "reload_dataloaders_every_n_epochs": 0,
}
# 0 would train or evaluate nothing
_ABOVE_ZERO = ("limit_train_batches", "limit_test_batches", "limit_predict_batches", "val_check_interval")
_NOT_ZERO = ("max_epochs", "max_steps")
PARTS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")


def check_numbers(config: Mapping[str, Any]) -> None:
    """Refuse numbers that no option can mean: null where a value is needed, NaN, infinity, numbers without end, seeds
    that are taken for others, and numbers out of range of the Trainer.

    Args:
        config: the options of a command, as plain data; a part is ``{"class_path": ..., "init_args": {...}}``.

    Raises:
        InputError: the first such number, by its option.
    """
    for name, value in leaves(config):
        option, last = f"--{name}", name.rpartition(".")[2]
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise InputError(f"{option} {value} must be a finite number")
        if abs(value) > _LARGEST and isinstance(value, int):
            raise InputError(f"{option} {value} is too large: it must be at most {_LARGEST}")
        if last in _SEEDS and not 0 <= value <= _LARGEST_SEED:
            raise InputError(f"{option} {value} must lie between 0 and {_LARGEST_SEED}: it is a seed")
    trainer = config.get("trainer") or {}
    for name, value in trainer.items():
        if not isinstance(value, int | float):
            continue
        least = _LEAST.get(name)
        if least is not None and value < least:
            raise InputError(f"--trainer.{name} {value} must be {least:g} or more")
        if (name in _ABOVE_ZERO and value <= 0) or (name in _NOT_ZERO and value == 0):
            raise InputError(f"--trainer.{name} {value:g} leaves nothing to do: it must be above 0")
        if name in (*PARTS, "val_check_interval") and isinstance(value, float) and value > 1 and not value.is_integer():
            raise InputError(
                f"--trainer.{name} {value} is a part of the whole: it must be at most 1.0, or a whole number"
            )
    _check_devices(trainer.get("devices"))


def _check_devices(devices: Any) -> None:
    words = str(devices).strip("[]").split(",") if not isinstance(devices, list) else map(str, devices)
    known = devices is None or devices == "auto" or all(word.strip().lstrip("-").isdigit() for word in words)
    if not known or (isinstance(devices, int) and (devices == 0 or devices < -1)):
        raise InputError(f"--trainer.devices {devices} must be a number of devices, a list of their numbers, or auto")


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its option; ``null`` where its class needs a value is refused on the way."""
    if isinstance(value, Mapping):
        inside = value
        if isinstance(value.get("class_path"), str):
            inside = value.get("init_args") or {}
            _refuse_null(value["class_path"], inside, name)
        for key, item in inside.items():
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item, name)
    else:
        yield name, value


def _refuse_null(class_path: str, arguments: Mapping[str, Any], name: str) -> None:
    missing = [key for key, value in arguments.items() if value is None and key not in _FROM_THE_DATA]
    if not missing:
        return
    try:
        known = parameters_of(resolve_name(class_path))
    except (ValueError, ImportError, AttributeError, TypeError):
        return  # whatever that is, it is said where it is made
    for key in missing:
        if key in known and known[key].default is not None and not _takes_none(known[key].annotation):
            raise InputError(f"--{name}.{key} null: a value is needed")


def _takes_none(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_takes_none(each) for each in get_args(annotation))
    return annotation in (Any, object, None, NoneType, Parameter.empty) or isinstance(annotation, TypeVar)
