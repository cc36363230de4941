import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["MeanAndError"]


class MeanAndError(Metric):
    """Mean and standard error of a value over images, each image once, on any number of processes.

    Keeps float64 count, mean and sum of squared deviations and merges them exactly (Chan et al. 1979), for batches and
    processes of unequal size. The standard error is std / sqrt(N); nan for N = 1.
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
        """Add values ``[B]``; none at all changes nothing."""
        if values.numel() == 0:
            return
        values = values.double()
        mean = values.mean()
        self.count = torch.cat([self.count, torch.full_like(self.count[:1], values.numel())])
        self.mean = torch.cat([self.mean, mean.reshape(1)])
        self.m2 = torch.cat([self.m2, (values - mean).square().sum().reshape(1)])
        count, mean, m2 = self._merged()
        self.count, self.mean, self.m2 = count.reshape(1), mean.reshape(1), m2.reshape(1)

    def compute(self) -> dict[str, Tensor]:
        """``mean`` and ``se`` (float64 scalars), ``count`` (number of values)."""
        count, mean, m2 = self._merged()
        return {"mean": mean, "se": (m2 / (count - 1) / count).sqrt(), "count": count}

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """All entries as one. After a synchronisation, and while a batch is added, there are several."""
        count = self.count.sum()
        mean = (self.count * self.mean).sum() / count
        m2 = (self.m2 + self.count * (self.mean - mean).square()).sum()
        return count, mean, m2
