r"""How training draws its times, and how an estimator of the bound picks its steps.

A draw is a position u on the unit interval, from the first state's end of the time axis to t = 1, and a weight w with

.. math:: E[w f(u)] = \int_0^1 f(u) \, du

for every f, so the expected loss does not depend on the sampler. A discrete chain takes step
:math:`1 + \lfloor u T \rfloor` (:func:`steps_of`), continuous time takes u itself, stretched over its axis.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_lightning.errors import InputError, at_least, positive
from ddpm_lightning.ops import BatchGenerator, Generators, expand_to, rand, shuffled_places

__all__ = [
    "EquispacedTimes",
    "ImportanceTimes",
    "LogitNormalTimes",
    "StratifiedTimes",
    "TimeDraw",
    "TimeSampler",
    "UniformTimes",
    "inverse_cdf",
    "logit_normal_density",
    "steps_of",
    "stratified_steps",
]

_LAST_BELOW_1 = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class TimeDraw:
    """A position in [0, 1) for each image of a batch, and the weight of the loss there: float64 ``[B]``."""

    position: Tensor
    weight: Tensor


def steps_of(draw: TimeDraw, T: int) -> Tensor:
    r"""The steps of a chain of T that the positions stand for, int64 ``[B]`` in 1..T:
    :math:`1 + \lfloor \text{position} \, T \rfloor`."""
    return 1 + (draw.position * T).long().clamp_(max=T - 1)


class TimeSampler(nn.Module):
    """Draws a position for each image of a batch. What it learns is in buffers, so checkpoints hold it."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, like: Tensor, generators: Generators = None) -> TimeDraw:
        """A draw for B = ``like.shape[0]`` images, on the device of ``like``.

        Args:
            like: ``[B, ...]``.
        """
        raise NotImplementedError

    def update(self, position: Tensor, loss: Tensor) -> None:
        """Learn from losses ``[B]``, without the draw's weight, at positions ``[B]``. Here nothing is learned."""


class UniformTimes(TimeSampler):
    """Independent draws (Ho et al. 2020, algorithm 1)."""

    def forward(self, like: Tensor, generators: Generators = None) -> TimeDraw:
        return _uniform_draw(rand(like, generators))


class StratifiedTimes(TimeSampler):
    """One draw in each of B equal parts of the time axis, in shuffled order (after Kingma et al. 2021, appendix I.1).

    Each draw is uniform by itself, and a batch covers all noise levels, which lowers the variance of the loss. B counts
    the images of all processes. Each accumulated batch covers the axis by itself.
    """

    def forward(self, like: Tensor, generators: Generators = None) -> TimeDraw:
        stratum, count = shuffled_places(like, generators)
        return _uniform_draw((stratum + rand(like, generators)) / count)


class EquispacedTimes(TimeSampler):
    r"""Equally spaced times with one random offset (Kingma et al. 2021, arXiv 2107.00630, appendix I.1):

    .. math:: u_j = (u_0 + j/N) \bmod 1, \quad j = 0, \dots, N - 1

    over all N images of an optimiser step. Every single u_j is uniform. Batch p of P accumulated ones takes
    j = p, p + P, ... in shuffled order, and so covers the whole axis too. If batches differ in size or are left out, as
    in the last accumulation of an epoch, the union is unbiased, but no longer equally spaced.
    """

    def forward(self, like: Tensor, generators: Generators = None) -> TimeDraw:
        place, count = shuffled_places(like, generators)
        if isinstance(generators, BatchGenerator):
            u0 = rand(like[:1], generators.step_generator or generators.generator)
            offset = u0 + generators.batch / (generators.batches * count)
        else:
            offset = rand(like, generators)[:1]
        return _uniform_draw((offset + place / count) % 1)


class ImportanceTimes(TimeSampler):
    r"""Times where the losses are large are drawn more often and weigh less (Nichol & Dhariwal 2021, arXiv 2102.09672,
    section 3.3). The time axis is cut into equal bins, and bin k is drawn with

    .. math::

        p_k = (1 - \text{uniform}) \frac{\sqrt{E[L_k^2]}}{\sum_i \sqrt{E[L_i^2]}} + \frac{\text{uniform}}{\text{bins}},
        \qquad \text{weight } \frac{1}{\text{bins} \, p_k}

    uniformly within the bin; :math:`E[L_k^2]` is the mean over the bin's last ``history`` losses. Until every bin has
    that many, draws are uniform. Whatever the history holds, the draw is unbiased: the weight belongs to the p_k in
    use.

    Under DistributedDataParallel every process notes its own losses, and at the next optimiser step the buffers of the
    first process replace all others (``broadcast_buffers``). So the history holds the losses of the first process.
    Without that broadcast the histories differ, and the gradient stays unbiased. Losses that are not finite are not
    noted.

    Args:
        bins: number of equal parts of the axis. The original has one for each step of the chain. At least
            ``bins * history`` losses fill them.
        history: number of losses that a bin remembers.
        uniform: share of the draws that are uniform, in (0, 1]: it bounds the weights by 1 / uniform.
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, bins: int = 100, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        at_least(1, bins=bins, history=history)
        if not 0 < uniform <= 1:
            raise InputError(f"uniform = {uniform:g} must lie in (0, 1]")
        self.bins, self.history, self.uniform = bins, history, uniform
        self.register_buffer("losses", torch.zeros(bins, history))
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.long))

    def probabilities(self) -> Tensor:
        """p_k, float64 ``[bins]``."""
        # the clamp makes losses that are all zero uniform, not 0/0
        root_mean_square = self.losses.double().square().mean(1).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        learned = (1 - self.uniform) * root_mean_square / root_mean_square.sum() + self.uniform / self.bins
        return torch.where((self.counts >= self.history).all(), learned, 1 / self.bins)

    def forward(self, like: Tensor, generators: Generators = None) -> TimeDraw:
        p = self.probabilities()
        index, within = inverse_cdf(p, rand(like, generators))
        position = ((index + within) / self.bins).clamp(max=_LAST_BELOW_1)
        return TimeDraw(position, 1 / (self.bins * torch.take(p, index)))

    @torch.no_grad()
    def update(self, position: Tensor, loss: Tensor) -> None:
        """Remember the losses ``[B]`` at positions ``[B]``, the batch's later ones as the more recent."""
        # Tensors of unknown size would make the host wait for the device. So losses that must not be kept are written
        # too, to an extra cell and an extra bin that are cut off again.
        index = (position * self.bins).long().clamp_(max=self.bins - 1)
        index = torch.where(torch.isfinite(loss), index, self.bins)
        ordered, order = torch.sort(index, stable=True)
        start = torch.searchsorted(ordered, ordered)
        end = torch.searchsorted(ordered, ordered, right=True)
        rank = torch.arange(len(ordered), device=ordered.device) - start
        counts = torch.cat([self.counts, self.counts.new_zeros(1)])
        slot = (torch.take(counts, ordered) + rank) % self.history
        # of more than ``history`` losses in one bin only the last are written, so no cell is written twice
        written = (ordered < self.bins) & (rank >= end - start - self.history)
        cell = torch.where(written, ordered * self.history + slot, self.losses.numel())
        cells = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        cells.scatter_(0, cell, torch.take(loss, order).to(cells.dtype))
        self.losses.copy_(cells[:-1].view_as(self.losses))
        self.counts.copy_(counts.scatter_add_(0, ordered, torch.ones_like(ordered))[:-1])


class LogitNormalTimes(TimeSampler):
    r"""More times from the middle of the axis (Esser et al. 2024, arXiv 2403.03206):

    .. math:: \mathrm{logit}(u) \sim N(\text{mean}, \text{std}^2)

    As of every sampler, the weights leave the expected loss as it is, here at the price of rare draws of large weight.
    Flow matching trains without them: let ``LogitNormalWeighting`` cancel them.

    Args:
        mean: mean of logit(u): above 0 for more noise.
        std: standard deviation of logit(u), positive.
        times: draws the quantiles; None for StratifiedTimes.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, times: TimeSampler | None = None) -> None:
        super().__init__()
        positive(std=std)
        self.mean, self.std, self.times = mean, std, times or StratifiedTimes()

    def forward(self, like: Tensor, generators: Generators = None) -> TimeDraw:
        draw = self.times(like, generators)
        quantile = draw.position.clamp(1e-9, 1 - 1e-9)
        position = torch.sigmoid(self.mean + self.std * torch.special.ndtri(quantile)).clamp(max=_LAST_BELOW_1)
        return TimeDraw(position, draw.weight / logit_normal_density(position, self.mean, self.std))


def logit_normal_density(u: Tensor, mean: float, std: float) -> Tensor:
    r"""Density at u in (0, 1) of a number whose logit is :math:`N(\text{mean}, \text{std}^2)`, float64; 0 at the
    ends."""
    inside = u.clamp(1e-300, _LAST_BELOW_1)
    z = (torch.logit(inside) - mean) / std
    density = torch.exp(-0.5 * z.square()) / (std * math.sqrt(2 * math.pi) * inside * (1 - inside))
    return torch.where((u > 0) & (u < 1), density, 0.0)


def inverse_cdf(probabilities: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The bin in which a uniform number lies, where bin k has the share ``probabilities[k]`` of [0, 1), and how far it
    lies through that bin, which is a uniform number by itself.

    Args:
        probabilities: positive, with the sum 1, float64 ``[bins]``.
        u: in [0, 1], float64 of any shape.

    Returns:
        int64 in 0..bins - 1 and float64 in [0, 1], of the shape of ``u``.
    """
    upper = probabilities.cumsum(0)
    index = torch.searchsorted(upper, u, right=True).clamp_(max=len(upper) - 1)
    return index, (1 - (torch.take(upper, index) - u) / torch.take(probabilities, index)).clamp(0, 1)


def _uniform_draw(position: Tensor) -> TimeDraw:
    # sums and quotients of numbers below 1 may round up to 1
    return TimeDraw(position.clamp(max=_LAST_BELOW_1), torch.ones_like(position))


def stratified_steps(
    count: int, steps: int | None, like: Tensor, generators: Generators = None
) -> tuple[Tensor, Tensor]:
    """A stratified choice out of step indices 1..count: indices int64 ``[K, B]``, increasing along K, and weights
    float64 ``[K]``, so that ``sum_k weights[k] f(indices[k])`` is an unbiased estimate of ``sum_{i=1..count} f(i)``.

    The indices are cut into ``steps`` runs of nearly equal length, and one index is drawn from each. With
    ``steps=None`` or ``steps >= count`` every index is taken once with weight 1, and nothing is drawn.
    """
    if steps is not None:
        at_least(1, "None stands for all of them", steps=steps)
    if steps is None or steps >= count:
        indices = torch.arange(1, count + 1, device=like.device)
        return indices[:, None].expand(count, like.shape[0]), torch.ones(count, dtype=torch.float64, device=like.device)
    edges = torch.arange(steps + 1, device=like.device) * count // steps
    lengths = edges.diff()
    draws = torch.stack([rand(like, generators) for _ in range(steps)])
    offsets = (draws * expand_to(lengths, draws)).long()
    return 1 + edges[:-1, None] + torch.minimum(offsets, lengths[:, None] - 1), lengths.double()
