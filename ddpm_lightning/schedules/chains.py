r"""Discrete chains: a list of betas, held as one float64 table of :math:`-\log \bar\alpha`."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.ops import DeviceTable, log1mexp
from ddpm_lightning.schedules.base import Schedule
from ddpm_lightning.schedules.grids import chain_grid

__all__ = ["BetaChain", "CosineChain", "LinearChain"]


class BetaChain(Schedule):
    r"""A chain given by its step variances beta_1..beta_T.

    With

    .. math::

        L_i &= -\log \bar\alpha_i = -\sum_{j \le i} \log(1 - \beta_j), \quad L_0 = 0 \\
        \gamma(i/T) &= \log(1/\bar\alpha_i - 1) = L_i + \log(1 - e^{-L_i})

    Between grid points L is interpolated linearly. This is a continuous process whose restriction to the grid is
    exactly the chain, so a sampler may stop at any t.

    Args:
        betas: the T step variances, each in (0, 1).
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        super().__init__()
        values = torch.as_tensor(betas, dtype=torch.float64, device="cpu").flatten()
        self.betas = values.tolist()
        if values.numel() == 0:
            raise InputError("a chain needs at least one beta")
        if not bool(((values > 0) & (values < 1)).all()):
            low, high = float(values.min()), float(values.max())
            raise InputError(f"every beta must lie strictly between 0 and 1, these span {low:g} to {high:g}")
        self.T = values.numel()
        self._table = DeviceTable(torch.cat([values.new_zeros(1), -torch.log1p(-values).cumsum(0)]))

    def grid(self, T: int | None = None) -> Tensor:
        """i/T for i = 0..T. With another T than the chain's own, another chain through the same continuous process."""
        if T is not None:
            at_least(1, T=T)
        return chain_grid(self.T if T is None else T)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L at both ends of the step that holds t, and the fraction of the step before t."""
        table = self._table.on(t.device)
        position = t.double().clamp(0, 1) * self.T
        lower = position.floor().long().clamp(max=self.T - 1)
        # take, since indexing with a scalar tensor would wait for the device
        return torch.take(table, lower), torch.take(table, lower + 1), position - lower

    def neg_log_alpha_bar(self, t: Tensor) -> Tensor:
        r""":math:`L(t) = -\log \bar\alpha(t)`."""
        return torch.lerp(*self._segment(t))

    def gamma(self, t: Tensor) -> Tensor:
        """-inf at t = 0, where alpha-bar is 1."""
        neg_log_alpha_bar = self.neg_log_alpha_bar(t)
        return neg_log_alpha_bar + log1mexp(neg_log_alpha_bar)

    def gamma_slope(self, t: Tensor) -> Tensor:
        """:math:`L'(t) / (1 - e^{-L(t)})`, for t in (0, 1]."""
        start, end, fraction = self._segment(t)
        return (start - end) * self.T / torch.expm1(-torch.lerp(start, end, fraction))

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * self.neg_log_alpha_bar(t)


class LinearChain(BetaChain):
    """Betas linear from ``beta_start`` to ``beta_end`` in T steps (Ho et al. 2020, arXiv 2006.11239, section 4).

    The usual end points 1e-4 and 0.02 belong to T = 1000. With T = 300 they leave alpha-bar_T = 0.048: x_T still shows
    the image, and prior matching is not small. ``reference_T`` scales both betas by reference_T / T.

    Args:
        T: number of steps, at least 1.
        beta_start: beta_1, in (0, 1).
        beta_end: beta_T, in (0, 1).
        reference_T: number of steps that the two betas are meant for; None takes them as they are.
    """

    def __init__(
        self, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, reference_T: int | None = None
    ) -> None:
        at_least(1, T=T)
        scale = 1.0 if reference_T is None else reference_T / T
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not 0 < beta * scale < 1:
                scaled = "" if reference_T is None else f" (times reference_T / T = {scale:g})"
                raise InputError(f"{name} = {beta:g}{scaled} must lie strictly between 0 and 1")
        super().__init__(torch.linspace(beta_start, beta_end, T, dtype=torch.float64) * scale)
        self.beta_start, self.beta_end, self.reference_T = beta_start, beta_end, reference_T


class CosineChain(BetaChain):
    """The cosine chain of Nichol & Dhariwal 2021 (arXiv 2102.09672, equation 17).

    alpha-bar is derived from the clipped betas, so that the two always agree.

    Args:
        T: number of steps, at least 1.
        offset: the small s that keeps beta_1 from vanishing, in [0, 1].
        max_beta: largest beta, in (0, 1).
    """

    def __init__(self, T: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> None:
        at_least(1, T=T)
        if not 0 <= offset <= 1:
            raise InputError(f"offset = {offset:g} must lie in [0, 1]")
        if not 0 < max_beta < 1:
            raise InputError(f"max_beta = {max_beta:g} must lie strictly between 0 and 1")
        super().__init__(betas_of(lambda t: math.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2, T, max_beta))
        self.offset, self.max_beta = offset, max_beta


def betas_of(alpha_bar: Callable[[float], float], T: int, max_beta: float) -> list[float]:
    r"""The T betas of a continuous alpha-bar, clipped from above:

    .. math:: \beta_i = 1 - \bar\alpha(i/T) / \bar\alpha((i - 1)/T)
    """
    return [min(1 - alpha_bar(i / T) / alpha_bar((i - 1) / T), max_beta) for i in range(1, T + 1)]
