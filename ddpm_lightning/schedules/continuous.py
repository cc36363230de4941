r"""Schedules that are functions of continuous time: any number of steps, and the limit of infinitely many.

Their first state, t = 0, is already noisy, with SNR :math:`e^{-\gamma_{\min}}`; the data have no time of their own in
[0, 1] and stand at t = -1 in the grid, where gamma is -inf.
"""

import math

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.schedules.base import Schedule
from ddpm_lightning.schedules.grids import chain_grid

__all__ = ["ContinuousSchedule", "CosineGamma", "LinearGamma"]


class ContinuousSchedule(Schedule):
    """Base of the schedules in continuous time. Subclasses define :meth:`state_gamma` and ``gamma_slope``.

    Args:
        gamma_min: -log SNR of the first state.
        gamma_max: -log SNR of the last state, above ``gamma_min``.
        T: number of states x_1, ..., x_T of the discrete chain, at least 2.
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, T: int = 1000) -> None:
        super().__init__()
        if not gamma_min < gamma_max:
            raise InputError(
                f"gamma_min = {gamma_min:g} must be below gamma_max = {gamma_max:g}, so that the signal-to-noise ratio "
                "falls with t"
            )
        at_least(2, T=T)
        self.gamma_min, self.gamma_max, self.T = gamma_min, gamma_max, T

    def state_gamma(self, t: Tensor) -> Tensor:
        r""":math:`-\log \mathrm{SNR}(t)` for t in [0, 1], float64."""
        raise NotImplementedError

    def gamma(self, t: Tensor) -> Tensor:
        """-inf for t < 0, the data."""
        t = t.double()
        return torch.where(t < 0, -torch.inf, self.state_gamma(t))

    def grid(self, T: int | None = None) -> Tensor:
        """The data at -1, then T equally spaced states from 0 to 1."""
        if T is not None:
            at_least(2, T=T)
        return torch.cat([torch.tensor([-1.0], dtype=torch.float64), chain_grid((self.T if T is None else T) - 1)])


class LinearGamma(ContinuousSchedule):
    """gamma linear in t from ``gamma_min`` to ``gamma_max`` (Kingma et al. 2021, arXiv 2107.00630)."""

    def state_gamma(self, t: Tensor) -> Tensor:
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t

    def gamma_slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t.double(), self.gamma_max - self.gamma_min)


class CosineGamma(ContinuousSchedule):
    r""":math:`\alpha = \cos\varphi, \sigma = \sin\varphi` with an angle linear in t (Nichol & Dhariwal 2021, arXiv
    2102.09672, in continuous time), from ``gamma_min`` to ``gamma_max``:

    .. math::

        \gamma = 2 \log \tan \varphi, \qquad \frac{d\gamma}{dt} = \frac{4 \varphi'}{\sin 2\varphi}
    """

    def _angle(self, t: Tensor) -> tuple[Tensor, float]:
        first, last = (math.atan(math.exp(0.5 * gamma)) for gamma in (self.gamma_min, self.gamma_max))
        return first + (last - first) * t, last - first

    def state_gamma(self, t: Tensor) -> Tensor:
        return 2 * torch.log(torch.tan(self._angle(t)[0]))

    def gamma_slope(self, t: Tensor) -> Tensor:
        angle, rate = self._angle(t.double())
        return 4 * rate / torch.sin(2 * angle)
