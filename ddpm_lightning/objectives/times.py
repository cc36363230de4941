"""How training draws its times, and how an estimator of the bound picks its steps."""

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators, expand_to, rand, randint

__all__ = ["StratifiedTimes", "TimeSampler", "UniformTimes", "stratified_steps"]


class TimeSampler:
    """Draws one step index i in 1..T for each image of a batch."""

    def __call__(self, T: int, like: Tensor, generators: Generators = None) -> Tensor:
        """int64 ``[B]`` with B = ``like.shape[0]``, each i uniform on 1..T by itself."""
        raise NotImplementedError


class UniformTimes(TimeSampler):
    """Independent draws (Ho et al. 2020, algorithm 1)."""

    def __call__(self, T: int, like: Tensor, generators: Generators = None) -> Tensor:
        """Independent uniform steps."""
        return 1 + randint(T, like, generators)


class StratifiedTimes(TimeSampler):
    """One draw in each of B equal parts of the time axis, in shuffled order: each is uniform by itself, and a batch
    covers all noise levels, which lowers the variance of the loss (after Kingma et al. 2021, appendix I.1)."""

    def __call__(self, T: int, like: Tensor, generators: Generators = None) -> Tensor:
        """Steps that cover 1..T evenly."""
        part = torch.argsort(rand(like, generators)).double()
        position = (part + rand(like, generators)) / like.shape[0]
        return 1 + (position * T).long().clamp_(max=T - 1)


def stratified_steps(
    count: int, steps: int | None, like: Tensor, generators: Generators = None
) -> tuple[Tensor, Tensor]:
    """A stratified choice out of step indices 1..count, for each image its own.

    The indices are cut into ``steps`` runs of nearly equal length and one index is drawn from each, so
    ``sum_k weights[k] f(indices[k])`` is an unbiased estimate of ``sum_{i=1..count} f(i)``. With ``steps=None``, or
    as many as there are indices, every index is taken once with weight 1 and nothing is drawn.

    Returns:
        indices int64 ``[K, B]``, increasing along K, and weights float64 ``[K]`` (the lengths of the runs).

    Raises:
        InputError: ``steps`` < 1.
    """
    if steps is not None and steps < 1:
        raise InputError(f"steps = {steps} must be 1 or more, or null for all of them")
    if steps is None or steps >= count:
        indices = torch.arange(1, count + 1, device=like.device)
        return indices[:, None].expand(count, like.shape[0]), torch.ones(count, dtype=torch.float64, device=like.device)
    edges = torch.arange(steps + 1, device=like.device) * count // steps
    lengths = edges.diff()
    draws = torch.stack([rand(like, generators) for _ in range(steps)])
    offsets = (draws * expand_to(lengths, draws)).long()
    return 1 + edges[:-1, None] + torch.minimum(offsets, lengths[:, None] - 1), lengths.double()
