"""Time grids: increasing times t_0 = 0 < t_1 < ... < t_K = 1. The solver takes its grid as an argument."""

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = ["chain_grid", "strided_grid"]


def chain_grid(T: int) -> Tensor:
    """Every time of a chain of T steps: float64 ``[T + 1]``, i/T for i = 0..T."""
    return torch.arange(T + 1, dtype=torch.float64) / T


def strided_grid(T: int, steps: int | None) -> Tensor:
    """``steps`` nearly equal strides over a chain of T steps, both ends included: float64 ``[steps + 1]``.

    The times are a subset of :func:`chain_grid`, so a network trained on the chain meets no time it has not seen, and
    the last step of the chain is always visited. ``steps=None`` keeps all T.

    Raises:
        InputError: ``steps`` outside 1..T.
    """
    if steps is None:
        return chain_grid(T)
    if not 1 <= steps <= T:
        raise InputError(f"steps = {steps} must lie between 1 and the chain's T = {T}")
    return torch.linspace(0, T, steps + 1, dtype=torch.float64).round() / T
