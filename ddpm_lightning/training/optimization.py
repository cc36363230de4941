"""The optimiser and the learning-rate scheduler of a configuration, made and checked before training."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from typing import Any

from jsonargparse.typing import register_type
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ddpm_lightning.errors import InputError
from ddpm_lightning.own_code import failure_in_own_code
from ddpm_lightning.training.optimizers import WarmupDecay

__all__ = ["FromFunction", "OptimizerFactory", "SchedulerFactory", "make_optimizer", "make_scheduler"]


class FromFunction:
    """A function of the user's in the place of a class, ``warmup(optimizer, steps)``, with its arguments but the first.

    Args:
        class_path: where the function is, ``MODULE.NAME``.
        init_args: its arguments by name, without the first.
    """

    def __init__(self, class_path: str, init_args: Mapping[str, Any] | None = None) -> None:
        self.class_path, self.init_args = class_path, dict(init_args or {})
        module, _, name = class_path.rpartition(".")
        function = getattr(import_module(module), name)
        if isinstance(function, type) or not callable(function):
            raise ValueError(f"{class_path} is no function")
        signature(function).bind(None, **self.init_args)  # a TypeError names the argument
        self._function = function

    def __call__(self, first: Any) -> Any:
        return self._function(first, **self.init_args)


def _read(value: Any) -> FromFunction:
    if isinstance(value, str):
        return FromFunction(value)
    described = value if isinstance(value, Mapping) else vars(value)
    if not described.keys() <= {"class_path", "init_args"}:
        raise ValueError(f"{value} is no class_path with init_args")
    arguments = described.get("init_args") or {}
    return FromFunction(described["class_path"], arguments if isinstance(arguments, Mapping) else vars(arguments))


def _written(value: FromFunction) -> dict[str, Any]:
    return {"class_path": value.class_path, "init_args": value.init_args}


register_type(FromFunction, _written, _read, (ValueError, TypeError, AttributeError, ImportError, KeyError))

# in this order: jsonargparse takes the first that fits
OptimizerFactory = FromFunction | Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = FromFunction | Callable[[Optimizer], LRScheduler]


def make_optimizer(factory: OptimizerFactory | None, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimiser of these parameters.

    Raises:
        InputError: there is none, it cannot be made, or it cannot train such a network.
    """
    if factory is None:
        raise InputError("this module has no optimiser: give --model.optimizer, for example torch.optim.Adam")
    with _naming("--model.optimizer"):
        optimizer = factory(parameters)
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"--model.optimizer makes a {name}, which is no torch.optim.Optimizer")
    if isinstance(optimizer, LBFGS):
        raise InputError(
            f"--model.optimizer {name} evaluates the loss several times in a step, and each time it has other noise: "
            "use a first-order optimiser, for example torch.optim.AdamW"
        )
    if isinstance(optimizer, SparseAdam):
        raise InputError(
            f"--model.optimizer {name} takes sparse gradients only, and these are dense: use torch.optim.Adam"
        )
    return optimizer


def make_scheduler(
    factory: SchedulerFactory, optimizer: Optimizer, bound: str | None, trainer: Trainer | None
) -> dict[str, Any]:
    """The scheduler as Lightning takes it: stepped after each optimiser step.

    ``ReduceLROnPlateau`` is stepped by the module after each validation, on the bits/dim of the form ``bound``, the
    first of those measured.

    Raises:
        InputError: it cannot be made; ``ReduceLROnPlateau`` without a validation, or waiting for larger bounds.
    """
    with _naming("--model.lr_scheduler"):
        scheduler = factory(optimizer)
    name = type(scheduler).__name__
    if not isinstance(scheduler, LRScheduler):
        raise InputError(f"--model.lr_scheduler makes a {name}, which is no learning-rate scheduler of torch.optim")
    if isinstance(scheduler, WarmupDecay) and trainer is not None:
        scheduler.ends_at(trainer.estimated_stepping_batches)
    if not isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": "step"}
    if bound is None or (trainer is not None and trainer.training and not trainer.enable_validation):
        raise InputError(f"--model.lr_scheduler {name} follows a bound on the validation images, and none is measured")
    if scheduler.mode != "min":
        raise InputError(f"--model.lr_scheduler.mode {scheduler.mode}: bits/dim get better by getting smaller: use min")
    followed = f"val/{bound}/bits_per_dim"
    if (asked := getattr(scheduler, "monitor", followed)) != followed:  # Lightning's class of the same name
        raise InputError(
            f"--model.lr_scheduler.monitor {asked}: the first of the validation bounds is followed, {followed}"
        )
    # Lightning itself would step it after epochs without a validation, too
    return {"scheduler": scheduler, "monitor": followed, "frequency": sys.maxsize}


@contextmanager
def _naming(option: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise (error if str(error).startswith("--") else InputError(f"{option}: {error}")) from None
    except Exception as error:
        remedy = ""
        if "Muon" in str(error):
            remedy = ": ddpm_lightning.training.optimizers.MuonAdamW takes all weights"
        raise InputError(f"{option} cannot be made: {failure_in_own_code(error) or error}{remedy}") from error
