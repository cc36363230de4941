"""Time grids: increasing times, that of the data first, then the states up to t = 1. A solver is given its grid."""

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = ["chain_grid", "strided_grid"]


def chain_grid(T: int) -> Tensor:
    """Every time of a chain of T steps: float64 ``[T + 1]``, i/T for i = 0..T."""
    return torch.arange(T + 1, dtype=torch.float64) / T


def strided_grid(grid: Tensor, steps: int | None) -> Tensor:
    """``steps`` nearly equal strides over a chain's grid ``[T + 1]``, both ends included: float64 ``[steps + 1]``.

    The times are among the chain's own, so a network trained on the chain meets no time it has not seen, and the last
    step of the chain is always visited. ``steps=None`` keeps all T.

    Raises:
        InputError: ``steps`` outside 1..T.
    """
    T = len(grid) - 1
    if steps is None:
        return grid
    if not 1 <= steps <= T:
        raise InputError(f"steps = {steps} must lie between 1 and the chain's T = {T}")
    return grid[torch.linspace(0, T, steps + 1, dtype=torch.float64).round().long()]
