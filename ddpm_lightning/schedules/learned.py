import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddpm_lightning.schedules.continuous import ContinuousSchedule

__all__ = ["LearnedGamma"]


class LearnedGamma(ContinuousSchedule):
    r"""A learned monotone gamma(t) (Kingma et al. 2021, arXiv 2107.00630, appendix H).

    .. math::

        \gamma(t) &= \gamma_{\min} + (\gamma_{\max} - \gamma_{\min}) \, u(t),
            \quad u(t) = \frac{g(t) - g(0)}{g(1) - g(0)} \\
        g(t) &= t + \sum_k c_k \, \mathrm{sigmoid}(b_k (t - m_k)), \quad b_k, c_k > 0

    Both ends and the shape u between them are parameters; at first gamma is nearly linear. In discrete time the bound
    trains all of them (:class:`~ddpm_lightning.objectives.NegativeElbo`). In continuous time the bound does not depend
    on u. There u minimises the variance of the bound's estimator
    (:class:`~ddpm_lightning.objectives.ContinuousNegativeElbo`).

    Args:
        gamma_min: -log SNR of the first state, at the start of training.
        gamma_max: -log SNR of the last state, at the start of training, above ``gamma_min``.
        T: number of states x_1, ..., x_T of the discrete chain, at least 2.
        units: number of sigmoids.
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, T: int = 1000, units: int = 32) -> None:
        super().__init__(gamma_min, gamma_max, T)
        self.units = units
        self.first = nn.Parameter(torch.tensor(float(gamma_min)))
        self.log_span = nn.Parameter(torch.tensor(math.log(gamma_max - gamma_min)))
        self.raw_height = nn.Parameter(torch.full((units,), _softplus_inverse(0.1 / units)))
        self.raw_rate = nn.Parameter(torch.full((units,), _softplus_inverse(2.0 * units)))
        self.centre = nn.Parameter((torch.arange(units) + 0.5) / units)
        self._interior_held = False

    def _g(self, t: Tensor) -> tuple[Tensor, Tensor]:
        height, rate = softplus(self.raw_height.double()), softplus(self.raw_rate.double())
        step = torch.sigmoid(rate * (t[..., None] - self.centre.double()))
        return t + (height * step).sum(-1), 1 + (height * rate * step * (1 - step)).sum(-1)

    def interior(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """u(t) from 0 to 1, and du/dt."""
        ends, _ = self._g(torch.arange(2, dtype=torch.float64, device=t.device))  # made there: no copy to wait for
        value, slope = self._g(t)
        span = ends[1] - ends[0]
        u, du = (value - ends[0]) / span, slope / span
        return (u.detach(), du.detach()) if self._interior_held else (u, du)

    def state_gamma(self, t: Tensor) -> Tensor:
        return self.first.double() + torch.exp(self.log_span.double()) * self.interior(t)[0]

    def gamma_slope(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_span.double()) * self.interior(t.double())[1]

    @contextmanager
    def held_interior(self) -> Iterator[None]:
        self._interior_held = True
        try:
            yield
        finally:
            self._interior_held = False

    def slope_ratio(self, t: Tensor) -> Tensor:
        """du/dt at the fixed u(t), divided by its own value.

        The second moment of an estimator L = gamma'(t) f(gamma(t)) at uniform t is the integral of gamma' f^2 over
        gamma. At a fixed gamma only gamma' depends on the shape, so no gradient needs to pass through the network.
        """
        u, slope = self.interior(t.double().detach())
        # Where the shape changes, u keeps its value at another t. One Newton step gives that t to first order.
        moved = t.double().detach() - (u - u.detach()) / slope.detach()
        return self.interior(moved)[1] / slope.detach()


def _softplus_inverse(value: float) -> float:
    return math.log(math.expm1(value)) if value < 30 else value
