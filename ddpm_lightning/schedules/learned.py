import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.schedules.continuous import ContinuousSchedule

__all__ = ["LearnedGamma", "PixelwiseGamma"]


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
        self._set_parameters(units, ())

    def _set_parameters(self, units: int, shape: tuple[int, ...]) -> None:
        """Ends and heights for each pixel of a ``shape``."""
        at_least(1, units=units)
        self.units = units
        self.first = nn.Parameter(torch.full(shape, float(self.gamma_min)))
        self.log_span = nn.Parameter(torch.full(shape, math.log(self.gamma_max - self.gamma_min)))
        self.raw_height = nn.Parameter(torch.full((*shape, units), _softplus_inverse(0.1 / units)))
        self.raw_rate = nn.Parameter(torch.full((units,), _softplus_inverse(2.0 * units)))
        self.centre = nn.Parameter((torch.arange(units) + 0.5) / units)
        self._interior_held = False

    def _g(self, t: Tensor) -> tuple[Tensor, Tensor]:
        height, rate = softplus(self.raw_height.double()), softplus(self.raw_rate.double())
        step = torch.sigmoid(rate * (t[..., None] - self.centre.double()))
        return t + (height * step).sum(-1), 1 + (height * rate * step * (1 - step)).sum(-1)

    def interior(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """:math:`u(t)` from 0 to 1, and :math:`du/dt`."""
        # made there: no copy to wait for
        ends, _ = self._g(torch.arange(2, dtype=torch.float64, device=t.device).reshape(-1, *(1,) * self.first.ndim))
        value, slope = self._g(t)
        span = ends[1] - ends[0]
        u, du = (value - ends[0]) / span, slope / span
        return (u.detach(), du.detach()) if self._interior_held else (u, du)

    def state_gamma(self, t: Tensor) -> Tensor:
        return self.first.double() + torch.exp(self.log_span.double()) * self.interior(t)[0]

    def gamma_slope(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_span.double()) * self.interior(t.double())[1]

    def held_interior(self) -> AbstractContextManager[None]:
        return self._held()

    @contextmanager
    def _held(self) -> Iterator[None]:
        self._interior_held = True
        try:
            yield
        finally:
            self._interior_held = False

    def slope_ratio(self, t: Tensor) -> Tensor | None:
        r""":math:`du/dt` at the fixed :math:`u(t)`, divided by its own value.

        The second moment of an estimator :math:`L = \gamma'(t) f(\gamma(t))` at uniform t is
        :math:`\int \gamma' f^2 \, d\gamma`. At a fixed gamma only gamma' depends on the shape, so no gradient needs to
        pass through the network.
        """
        u, slope = self.interior(t.double().detach())
        # Where the shape changes, u keeps its value at another t. One Newton step gives that t to first order.
        moved = t.double().detach() - (u - u.detach()) / slope.detach()
        return self.interior(moved)[1] / slope.detach()


class PixelwiseGamma(LearnedGamma):
    r"""A learned monotone gamma(t) for each pixel (Sahoo et al. 2023, MuLAN, arXiv 2312.13236, without its dependence
    on the image): :class:`LearnedGamma` with ends and heights c_k of its own, and b_k and m_k shared by all pixels.

    In continuous time the bound is a sum of line integrals along the paths of all gammas. It depends on these paths and
    not only on their ends, so the bound trains the shape too.

    Args:
        shape: ``(C, H, W)`` of the images, or ``(C, *space)`` of fields of one to three dimensions.
        gamma_min: -log SNR of the first state, at the start of training.
        gamma_max: -log SNR of the last state, at the start of training, above ``gamma_min``.
        T: number of states x_1, ..., x_T of the discrete chain, at least 2.
        units: number of sigmoids.
    """

    def __init__(
        self,
        shape: Sequence[int],
        gamma_min: float = -13.3,
        gamma_max: float = 5.0,
        T: int = 1000,
        units: int = 8,
    ) -> None:
        # not LearnedGamma's, which would make weights for one pixel first
        ContinuousSchedule.__init__(self, gamma_min, gamma_max, T)
        if len(shape) not in (2, 3, 4) or min(shape) < 1:
            raise InputError(
                f"shape = {list(shape)} must be (C, H, W) of the images, three whole numbers from 1, or (C, L) or "
                "(C, D, H, W) of fields"
            )
        self.shape = tuple(shape)
        self._set_parameters(units, self.shape)

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        return self.shape

    def gamma(self, t: Tensor) -> Tensor:
        return super().gamma(self._times(t))

    def gamma_slope(self, t: Tensor) -> Tensor:
        return super().gamma_slope(self._times(t))

    def _times(self, t: Tensor) -> Tensor:
        return t.reshape(-1, *(1,) * len(self.shape))

    def held_interior(self) -> AbstractContextManager[None]:
        return nullcontext()

    def slope_ratio(self, t: Tensor) -> Tensor | None:
        return None


def _softplus_inverse(value: float) -> float:
    return math.log(math.expm1(value)) if value < 30 else value
