"""Time grids: the time of the data, then increasing times of ``steps`` states up to t = 1, float64 ``[steps + 1]``.

``grid`` is the grid of the chain, ``[T + 1]``. ``steps=None`` stands for T. A solver is given its grid.
Where pixels have a gamma of their own, steps are equal in the mean of gamma.
"""

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
    """i/T for i = 0..T: float64 ``[T + 1]``."""
    return torch.arange(T + 1, dtype=torch.float64) / T


def strided_grid(grid: Tensor, steps: int | None) -> Tensor:
    """``steps`` (1..T) nearly equal strides over the grid of a chain, both ends included.

    The times are times of the chain, so a network that was trained on the chain meets no new time.
    """
    T = len(grid) - 1
    if steps is None:
        return grid
    if not 1 <= steps <= T:
        raise InputError(f"steps = {steps} must lie between 1 and the chain's T = {T}")
    return grid[torch.linspace(0, T, steps + 1, dtype=torch.float64).round().long()]


def logsnr_grid(schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
    r"""States equally spaced in :math:`\gamma = -\log \mathrm{SNR}`. Of ``grid`` the new grid keeps the data, the first
    state and 1.

    The other states may lie between the states of the chain, and ``steps`` may be larger than T. A single step has the
    last state only; a chain of one state takes a single step.
    """
    return _equal_steps(schedule, grid, steps, lambda gamma: gamma)


def karras_grid(schedule: Schedule, grid: Tensor, steps: int | None, rho: float = 7.0) -> Tensor:
    r"""States equally spaced in :math:`(\sigma/\alpha)^{1/\rho}`, :math:`\sigma/\alpha = e^{\gamma/2}`, rho > 0; else
    as :func:`logsnr_grid`.

    The larger rho, the more states at low noise; ``logsnr_grid`` is the limit (Karras et al. 2022, arXiv 2206.00364,
    equation 5).
    """
    positive(rho=rho)
    return _equal_steps(schedule, grid, steps, lambda gamma: torch.exp(gamma / (2 * rho)))


@torch.no_grad()
def _equal_steps(schedule: Schedule, grid: Tensor, steps: int | None, level: Callable[[Tensor], Tensor]) -> Tensor:
    """Times at which an increasing function of gamma takes equal steps. Bisection needs no inverse of the schedule."""
    T = len(grid) - 1
    steps = T if steps is None else steps
    at_least(1, steps=steps)
    if steps == 1:
        return grid[[0, -1]]
    if T == 1:
        raise InputError(f"steps = {steps} must be 1 for a chain of one state")
    # a learned schedule may live on another device than the grid
    times = grid.to(next(schedule.parameters(), grid).device)
    first, last = level(schedule.mean_gamma(times[[1, -1]]))
    targets = torch.lerp(first, last, torch.linspace(0, 1, steps, dtype=torch.float64, device=times.device))
    low, high = times[1].repeat(steps), times[-1].repeat(steps)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        below = level(schedule.mean_gamma(middle)) < targets
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.cat([grid[:2], high[1:-1].to(grid.device), grid[-1:]])


class TimeGrid:
    """A kind of grid, as an object that a configuration can name."""

    def __call__(self, schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
        """Times of the data and of ``steps`` states, float64 ``[steps + 1]``, from the chain's ``grid`` ``[T + 1]``."""
        raise NotImplementedError


class StridedGrid(TimeGrid):
    """States of the chain at nearly equal distances: :func:`strided_grid`."""

    def __call__(self, schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
        return strided_grid(grid, steps)


class LogSNRGrid(TimeGrid):
    """States at equal distances in log SNR: :func:`logsnr_grid`.

    They lie between the states of the chain. Samples of a network that was told the time, and trained at those states
    only, were no better with these times rounded to the nearest state, and better on StridedGrid (docs/sampling.md).
    """

    def __call__(self, schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
        return logsnr_grid(schedule, grid, steps)


class KarrasGrid(TimeGrid):
    r"""States at equal distances in :math:`(\sigma/\alpha)^{1/\rho}`: :func:`karras_grid`.

    As LogSNRGrid's, they lie between the states of the chain, with the same outcome.

    Args:
        rho: above 0; the larger, the more states at low noise.
    """

    def __init__(self, rho: float = 7.0) -> None:
        positive(rho=rho)
        self.rho = rho

    def __call__(self, schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
        return karras_grid(schedule, grid, steps, self.rho)
