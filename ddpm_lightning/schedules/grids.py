"""Time grids: increasing times, that of the data first, then the states up to t = 1. A solver is given its grid."""

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least, positive
from ddpm_lightning.schedules.base import Schedule

__all__ = [
    "KarrasGrid",
    "LogSNRGrid",
    "StridedGrid",
    "TimeGrid",
    "chain_grid",
    "karras_grid",
    "logsnr_grid",
    "strided_grid",
]

# of [0, 1], down to 1e-18
_HALVINGS = 60


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


def logsnr_grid(schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
    """The data, then ``steps`` states equally spaced in gamma = -log SNR: float64 ``[steps + 1]``.

    Args:
        schedule: gives gamma.
        grid: the chain's grid ``[T + 1]``, of which the new one keeps the time of the data, that of the first state (a
            single step has the last state only) and 1. The states between may lie between the chain's.
        steps: number of states, more than T too; None for T.

    Raises:
        InputError: ``steps`` < 1, or more than one step for a chain of one state.
    """
    return _equal_steps(schedule, grid, steps, lambda gamma: gamma)


def karras_grid(schedule: Schedule, grid: Tensor, steps: int | None, rho: float = 7.0) -> Tensor:
    """The data, then ``steps`` states equally spaced in (sigma/alpha)^(1/rho), sigma/alpha = exp(gamma/2): float64
    ``[steps + 1]`` (Karras et al. 2022, arXiv 2206.00364, equation 5). The larger rho, the more states at low noise;
    ``logsnr_grid`` is its limit.

    Args:
        schedule: gives gamma.
        grid: as in :func:`logsnr_grid`.
        steps: number of states, more than T too; None for T.
        rho: above 0.

    Raises:
        InputError: ``rho`` not above 0, ``steps`` < 1, or more than one step for a chain of one state.
    """
    positive(rho=rho)
    return _equal_steps(schedule, grid, steps, lambda gamma: torch.exp(gamma / (2 * rho)))


@torch.no_grad()
def _equal_steps(schedule: Schedule, grid: Tensor, steps: int | None, level: Callable[[Tensor], Tensor]) -> Tensor:
    """Times from the first state to the last at which an increasing function of gamma takes equal steps, by bisection:
    no schedule needs an inverse."""
    T = len(grid) - 1
    steps = T if steps is None else steps
    at_least(1, steps=steps)
    if steps == 1:
        return grid[[0, -1]]
    if T == 1:
        raise InputError(f"steps = {steps} must be 1 for a chain of one state")
    # a learned schedule may live on another device than the grid
    times = grid.to(next(schedule.parameters(), grid).device)
    first, last = level(schedule.gamma(times[[1, -1]]))
    targets = torch.lerp(first, last, torch.linspace(0, 1, steps, dtype=torch.float64, device=times.device))
    low, high = times[1].repeat(steps), times[-1].repeat(steps)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        below = level(schedule.gamma(middle)) < targets
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.cat([grid[:2], high[1:-1].to(grid.device), grid[-1:]])


class TimeGrid:
    """A kind of grid, as an object that a configuration can name."""

    def __call__(self, schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
        """The data, then ``steps`` states up to t = 1: float64 ``[steps + 1]``.

        Args:
            schedule: gives gamma.
            grid: the chain's grid ``[T + 1]``.
            steps: number of states; None for T.

        Raises:
            InputError: a number of steps that this kind cannot make of this chain.
        """
        raise NotImplementedError


class StridedGrid(TimeGrid):
    """States of the chain itself, nearly equally far apart: :func:`strided_grid`."""

    def __call__(self, schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
        return strided_grid(grid, steps)


class LogSNRGrid(TimeGrid):
    """States equally far apart in log SNR, which may lie between the chain's: :func:`logsnr_grid`."""

    def __call__(self, schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
        return logsnr_grid(schedule, grid, steps)


class KarrasGrid(TimeGrid):
    """States equally far apart in (sigma/alpha)^(1/rho), which may lie between the chain's: :func:`karras_grid`.

    Args:
        rho: above 0; the larger, the more states at low noise.

    Raises:
        InputError: another rho.
    """

    def __init__(self, rho: float = 7.0) -> None:
        positive(rho=rho)
        self.rho = rho

    def __call__(self, schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
        return karras_grid(schedule, grid, steps, self.rho)
