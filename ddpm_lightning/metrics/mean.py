"""A mean over images with its standard error."""

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MeanAndError"]


class MeanAndError(Metric):
    """Mean and standard error of a value over images, each image once, on any number of processes.

    Keeps float64 count, mean and sum of squared deviations and merges them exactly (Chan et al. 1979), so batches and
    processes of unequal size weigh as they should. The standard error is that of the mean over images:
    std / sqrt(N); nan for N = 1.
    """

    full_state_update = False
    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "mean", "m2"):
            self.add_state(name, torch.zeros(1, dtype=torch.float64), dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        """Add values ``[B]``."""
        values = values.double()
        mean = values.mean()
        self._merge(torch.full_like(mean, values.numel()), mean, (values - mean).square().sum())

    def _merge(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        share = torch.where(total > 0, count / total.clamp(min=1), 0.0)
        self.mean = self.mean + delta * share
        self.m2 = self.m2 + m2 + delta.square() * self.count * share
        self.count = total

    def compute(self) -> dict[str, Tensor]:
        """``mean`` and ``se`` (float64 scalars), ``count`` (number of values)."""
        # after synchronisation every state holds one entry for each process
        count = self.count.sum()
        mean = (self.count * self.mean).sum() / count
        m2 = (self.m2 + self.count * (self.mean - mean).square()).sum()
        return {"mean": mean, "se": (m2 / (count - 1) / count).sqrt(), "count": count}
