"""The same process in units in which the image keeps its scale."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ddpm_lightning.schedules.base import Schedule

__all__ = ["VarianceExploding"]


class VarianceExploding(Schedule):
    r""":math:`\alpha = 1, \sigma^2 = e^\gamma`, with the gamma of another schedule (Song et al. 2021, arXiv
    2011.13456).

    x_t is that of the variance-preserving schedule divided by its alpha_t. Posteriors, the prior and with
    FixedSmallVariance the bound are the same in both units (FixedLargeVariance is another variance in each).

    Args:
        schedule: gives gamma.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    @property
    def T(self) -> int:  # type: ignore[override]
        return self.schedule.T

    @property
    def pixel_shape(self) -> tuple[int, ...] | None:
        return self.schedule.pixel_shape

    def grid(self, T: int | None = None) -> Tensor:
        return self.schedule.grid(T)

    def gamma(self, t: Tensor) -> Tensor:
        return self.schedule.gamma(t)

    def gamma_slope(self, t: Tensor) -> Tensor:
        return self.schedule.gamma_slope(t)

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(self.gamma(t))

    def log_sigma2(self, t: Tensor) -> Tensor:
        return self.gamma(t)

    def log_unit_var(self, t: Tensor) -> Tensor:
        return softplus(self.gamma(t))

    def held_interior(self) -> AbstractContextManager[None]:
        return self.schedule.held_interior()

    def slope_ratio(self, t: Tensor) -> Tensor | None:
        return self.schedule.slope_ratio(t)
