"""The straight path between data and noise, as flow matching has it."""

import math

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.schedules.continuous import ContinuousSchedule

__all__ = ["StraightPath"]


class StraightPath(ContinuousSchedule):
    r"""The path of flow matching: x_t on the straight line from data to noise (conditional optimal transport of Lipman
    et al. 2022, arXiv 2210.02747; rectified flow of Liu et al. 2022, arXiv 2209.03003).

    .. math:: \alpha = 1 - \tau, \qquad \sigma = \tau, \qquad \gamma = 2 \log \frac{\tau}{1 - \tau}

    with tau linear in t, from ``first`` to ``last``. The path is cut at both ends, where the SNR would be infinite or
    0. Time runs from data to noise, as everywhere here; in the libraries of flow matching it runs the other way.

    Args:
        first: tau of the first state, x_1.
        last: tau of the last state, x_T; 0 < first < last < 1.
        T: number of states of the discrete chain, at least 2.
    """

    def __init__(self, first: float = 1e-3, last: float = 0.999, T: int = 1000) -> None:
        if not 0 < first < last < 1:
            raise InputError(f"first = {first:g} must lie between 0 and last = {last:g}, which must be below 1")
        gamma_min, gamma_max = (2 * math.log(tau / (1 - tau)) for tau in (first, last))
        super().__init__(gamma_min, gamma_max, T)
        self.first, self.last = first, last

    def _tau(self, t: Tensor) -> Tensor:
        """0 for t < 0, the data."""
        t = t.double()
        return torch.where(t < 0, 0.0, self.first + (self.last - self.first) * t)

    def state_gamma(self, t: Tensor) -> Tensor:
        tau = self._tau(t)
        return 2 * (torch.log(tau) - torch.log1p(-tau))

    def gamma_slope(self, t: Tensor) -> Tensor:
        tau = self._tau(t)
        return 2 * (self.last - self.first) / (tau * (1 - tau))

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-self._tau(t))

    def log_sigma2(self, t: Tensor) -> Tensor:
        return 2 * torch.log(self._tau(t))

    def log_unit_var(self, t: Tensor) -> Tensor:
        tau = self._tau(t)
        return torch.log1p(2 * tau * (tau - 1))
