r"""Which steps of a long chain an estimator of the bound evaluates, and what each of them weighs.

A choice draws steps n_k out of 1..count and weights w_k, K of them, with

.. math:: E \Big[ \sum_{k=1}^K w_k f(n_k) \Big] = \sum_{n=1}^{\text{count}} f(n)

for every f, so the expected bound does not depend on the choice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives.times import inverse_cdf, stratified_steps
from ddpm_lightning.ops import Generators, rand

__all__ = ["CostProfile", "EqualRuns", "SpreadSteps", "StepChoice", "StepDraw"]

_PARTS = 1000


@dataclass(frozen=True)
class StepDraw:
    """K steps for each of B images."""

    index: Tensor  # int64 [K, B] in 1..count, not decreasing along K
    weight: Tensor  # float64 [K] or [K, B]
    within: Tensor | None = None  # how far through its step a time lies, float64 [K, B] in [0, 1]; None: uniform


class StepChoice:
    """How the steps are drawn."""

    words = ""
    """What a report says of it."""

    def parts_of_time(self, steps: int) -> int:
        """Into how many equal parts continuous time is cut, of which ``steps`` are drawn: more than ``steps``, since
        all of them would be no draw."""
        return max(_PARTS, steps + 1)

    def draw(self, count: int, steps: int | None, like: Tensor, generators: Generators = None) -> StepDraw:
        """Draw ``steps`` of the steps 1..count for B = ``like.shape[0]`` images. With None, or as many as there are,
        each is taken once with weight 1, and nothing is drawn."""
        if steps is None or steps >= count:
            return StepDraw(*stratified_steps(count, None, like))
        return self.some(count, steps, like, generators)

    def some(self, count: int, steps: int, like: Tensor, generators: Generators) -> StepDraw:
        """As :meth:`draw`, for fewer steps than there are."""
        raise NotImplementedError


class EqualRuns(StepChoice):
    """One step out of each of K runs of nearly equal length, weighted by its length."""

    words = "from equal runs"

    def parts_of_time(self, steps: int) -> int:
        return steps

    def some(self, count: int, steps: int, like: Tensor, generators: Generators) -> StepDraw:
        return StepDraw(*stratified_steps(count, steps, like, generators))


class SpreadSteps(StepChoice):
    """Steps that are not drawn: at most K, spread over the chain, and closer to each other the nearer they are to one
    of its ends. Their sum estimates nothing; what each of them costs is measured there."""

    def some(self, count: int, steps: int, like: Tensor, generators: Generators) -> StepDraw:
        n = torch.arange(1, count + 1, dtype=torch.float64, device=like.device)
        place = (1 / n + 1 / (count + 1 - n) + 8 / count).cumsum(0)
        wanted = torch.linspace(0, 1, steps, dtype=torch.float64, device=like.device)
        index = 1 + torch.searchsorted(place, torch.lerp(place[0], place[-1], wanted)).unique()
        return StepDraw(index[:, None].expand(-1, like.shape[0]), torch.ones_like(index).double())


class CostProfile(nn.Module, StepChoice):
    r"""Steps that cost more are drawn more often and weigh less. Step n of a chain is drawn with

    .. math::

        p_n = (1 - \text{uniform}) \frac{c(u_n)}{\sum_i c(u_i)} + \frac{\text{uniform}}{\text{count}},
        \qquad \text{weight } \frac{1}{K p_n}

    where c(u) is what a step at position u in [0, 1] of the chain typically costs, the root mean square over images and
    noise: it minimises the variance of independent draws. The K draws are one in each of K equal parts of the
    cumulative probabilities.

    What was measured on a chain serves any other: between the measured positions c is interpolated linearly. Whatever
    was measured, the draw is unbiased, because the weight belongs to the p_n in use.

    Args:
        points: number of positions at which the cost is known, 2 or more.
        uniform: share of the draws that are uniform, in (0, 1]: it bounds the weights to 1 / uniform times those of
            uniform draws.
    """

    words = "by typical cost"
    position: Tensor
    cost: Tensor

    def __init__(self, points: int = 32, uniform: float = 0.1) -> None:
        super().__init__()
        if points < 2:
            raise InputError(f"points = {points} must be 2 or more")
        if not 0 < uniform <= 1:
            raise InputError(f"uniform = {uniform:g} must lie in (0, 1]")
        self.points, self.uniform = points, uniform
        self.register_buffer("position", torch.zeros(points))
        self.register_buffer("cost", torch.zeros(points))

    @property
    def is_measured(self) -> bool:
        return bool((self.cost > 0).any())

    def measure(self, count: int, index: Tensor, costs: Tensor) -> None:
        """Take up what some steps of a chain cost (``ElboEstimator.measure``). Costs that are not finite, or all 0,
        are not taken up.

        Args:
            count: number of steps of the chain.
            index: int64 ``[K]``, increasing, in 1..count; at most ``points``.
            costs: ``[B, K]``, one draw for each image.
        """
        typical = costs.double().square().mean(0).sqrt()
        if bool(typical.any()) and bool(typical.isfinite().all()):
            place = torch.arange(self.points, device=index.device).clamp(max=len(index) - 1)
            self.position.copy_(((index - 0.5) / count)[place])
            self.cost.copy_((typical / typical.max())[place])

    def probabilities(self, count: int) -> Tensor:
        """p_n of a chain of ``count`` steps, float64 ``[count]``."""
        known, cost = self.position.double(), self.cost.double().clamp(min=0)
        u = (torch.arange(count, dtype=torch.float64, device=known.device) + 0.5) / count
        after = torch.searchsorted(known, u).clamp_(1, self.points - 1)
        # the clamps continue c beyond the first and the last position as it is there
        width = (known[after] - known[after - 1]).clamp(min=torch.finfo(torch.float64).tiny)
        c = torch.lerp(cost[after - 1], cost[after], ((u - known[after - 1]) / width).clamp(0, 1))
        return (1 - self.uniform) * c / c.sum() + self.uniform / count

    def some(self, count: int, steps: int, like: Tensor, generators: Generators) -> StepDraw:
        p = self.probabilities(count)
        draws = torch.stack([rand(like, generators) for _ in range(steps)])
        index, within = inverse_cdf(p, (torch.arange(steps, device=like.device)[:, None] + draws) / steps)
        return StepDraw(1 + index, 1 / (steps * torch.take(p, index)), within)
