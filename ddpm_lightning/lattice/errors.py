"""Means of correlated samples and their errors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = ["Estimate", "integrated_autocorrelation_time", "jackknife", "leave_one_out"]

_WINDOW = 5.0


@dataclass(frozen=True)
class Estimate:
    """An estimate and its standard error."""

    mean: float
    se: float

    def __str__(self) -> str:
        return f"{self.mean:.6g} +- {self.se:.2g}"


def leave_one_out(values: Tensor, weights: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """Weighted means of all samples, ``[K]``, and of all but one block, ``[blocks, K]``; float64.

    Args:
        values: ``[n, K]``.
        weights: ``[n]``, not negative, of any scale; None for equal ones.
        block: consecutive samples of a block, see :func:`jackknife`.
    """
    n = len(values)
    if not isinstance(block, int) or block < 1 or n % block or n // block < 2:
        raise InputError(
            f"block = {block} must be a whole number that divides the {n} samples into two blocks or more: for an error"
            " there must be another block to compare with"
        )
    w = torch.ones(n, dtype=torch.float64, device=values.device) if weights is None else weights.double()
    if w.shape != (n,) or not bool((w >= 0).all()) or not bool(w.isfinite().all()):
        raise InputError(f"weights must be {n} finite numbers that are not negative, one for each sample")
    heavy = w.reshape(-1, block).sum(1)
    if not bool((heavy.sum() > heavy).all()):
        raise InputError("weights are 0 in all blocks but one: there is no error without a second block")
    sums = (w[:, None] * values.double()).reshape(-1, block, values.shape[1]).sum(1)
    total, weight = sums.sum(0), heavy.sum()
    return total / weight, (total - sums) / (weight - heavy)[:, None]


def spread(parts: Tensor) -> Tensor:
    """The jackknife's standard error from the values without one block, ``[blocks, ...]`` -> ``[...]``."""
    return ((len(parts) - 1) * (parts - parts.mean(0)).square().mean(0)).sqrt()


def jackknife(
    function: Callable[[Tensor], Tensor], values: Tensor, weights: Tensor | None = None, block: int = 1
) -> Estimate:
    """A function of means, and its error by leaving out one block after the other (Efron 1982).

    With block = 1 and the mean itself this is the standard deviation over the root of the number of samples. Samples of
    a Markov chain are correlated: let a block be a whole chain, or many autocorrelation times of one. The error itself
    is uncertain by a part of 1 / sqrt(2 blocks).

    Args:
        function: takes means ``[..., K]`` and returns ``[...]``.
        values: of each sample, ``[n, K]``.
        weights: ``[n]``, not negative, of any scale, for reweighted means; None for equal ones.
        block: consecutive samples of a block; must divide n into two blocks or more.
    """
    whole, parts = leave_one_out(values, weights, block)
    return Estimate(function(whole).item(), spread(function(parts)).item())


def integrated_autocorrelation_time(series: Tensor) -> Estimate:
    r""":math:`\tau = \tfrac12 + \sum_{t \ge 1} \rho(t)` of a stationary series, in its steps; 1/2 without correlation.

    A mean of n samples has the variance :math:`2 \tau \sigma^2 / n`. The sum ends at the first W that is at least
    :math:`5 \tau(W)`, and 5 (Madras and Sokal 1988, J. Stat. Phys. 50, 109, appendix C, also for the error; Wolff 2004,
    hep-lat/0306017, compares other windows). What lies beyond the window is missing, some e^-5 of an exponential decay.

    Args:
        series: ``[T]``, or ``[chains, T]`` for independent chains of one distribution.

    Returns:
        nan where the series is so short that the sum does not end within it, or constant.
    """
    if series.ndim not in (1, 2) or series.shape[-1] < 2:
        raise InputError(f"series of shape {list(series.shape)} must be [T] or [chains, T], with two steps or more")
    x = series.double().reshape(-1, series.shape[-1])
    chains, T = x.shape
    x = x - x.mean()
    transform = torch.fft.rfft(x, 2 * T)  # zeros behind, so that the end does not meet the start
    covariance = torch.fft.irfft(transform.abs().square().sum(0), 2 * T)[:T]
    covariance = covariance / (chains * torch.arange(T, 0, -1, dtype=torch.float64, device=x.device))
    if not covariance[0] > 0:
        return Estimate(math.nan, math.nan)
    tau = 0.5 + torch.cumsum(covariance[1:] / covariance[0], 0)
    lags = torch.arange(1, T, device=x.device)
    wide = (lags >= _WINDOW * tau.clamp(min=1)).nonzero()
    if not len(wide):
        return Estimate(math.nan, math.nan)
    W, found = int(lags[wide[0, 0]]), tau[wide[0, 0]].item()
    return Estimate(found, abs(found) * math.sqrt(2 * (2 * W + 1) / (chains * T)))
