"""The tensors of a file, before they become the weights of a module."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ddpm_lightning.errors import InputError

__all__ = ["check_finite", "check_state", "is_finite", "is_plain_tensor", "limited_weights"]


def is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def is_plain_tensor(value: Any) -> bool:
    """Whether a file's value is a tensor like a model's: dense, with its values in memory."""
    # a sparse, quantised or "meta" tensor could be copied into weights, and would leave nonsense there
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_quantized)


@contextmanager
def limited_weights(state: Mapping[Any, Any]) -> Iterator[None]:
    """Refuse, with an InputError, to make more weights than a file holds in ``state``: they could fill the memory.

    A weight is counted when it is registered, before its memory is written to.
    """
    plain = [value for value in state.values() if is_plain_tensor(value)]
    # several tensors may lie in one storage
    sizes = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() // v.element_size() for v in plain}
    left = sum(sizes.values())

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= 0 if parameter is None else max(1, parameter.numel())
        if left < 0:
            raise InputError("it has more weights than the file holds")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_state(network: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Any], strict: bool = True) -> None:
    """Compare the state dict of a module, with this network, with a file's.

    Raises:
        InputError: a tensor is of another shape or type or, if ``strict``, missing or left over.
    """
    for name in [*mine, *theirs] if strict else [name for name in mine if name in theirs]:
        if name not in theirs:
            difference = f"it lacks {name}"
        elif name not in mine:
            difference = f"it has {name}, which this model lacks"
        elif not is_plain_tensor(theirs[name]):
            difference = f"{name} is no plain tensor there"
        elif theirs[name].shape != mine[name].shape:
            difference = f"{name} is {list(theirs[name].shape)} there and {list(mine[name].shape)} here"
        elif _kind_of_number(theirs[name]) != _kind_of_number(mine[name]):
            difference = f"{name} is {theirs[name].dtype} there and {mine[name].dtype} here"
        else:
            continue
        raise InputError(
            f"the checkpoint is of another architecture than this {network}: "
            f"{difference}. Use the configuration that was saved beside it: -c RUN/config.yaml"
        )


def _kind_of_number(value: Tensor) -> tuple[bool, bool, bool]:
    return value.is_floating_point(), value.is_complex(), value.dtype == torch.bool


def check_finite(mine: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> None:
    """Refuse, with an InputError, a NaN or an infinity where the module's own tensor has none.

    What does not fit is left to :func:`check_state`.
    """
    for name, value in theirs.items():
        fits = name in mine and is_plain_tensor(value) and value.shape == mine[name].shape
        if fits and not is_finite(value) and is_finite(mine[name]):
            raise InputError(
                f"the checkpoint's weights are not finite (NaN or infinity, in {name}): take another checkpoint"
            )
