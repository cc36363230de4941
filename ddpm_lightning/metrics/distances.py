r"""Distances between two sets of images in a feature space: how samples are compared with data.

With features f(x) of dimension d, of real images r_1..r_m and samples s_1..s_n:

.. math::

    \text{Frechet} &= |\mu_r - \mu_s|^2 + \mathrm{tr}(C_r + C_s - 2 (C_r C_s)^{1/2}) \\
    \text{kernel} &= \mathop{\mathrm{mean}}_{i \ne j} k(r_i, r_j) + \mathop{\mathrm{mean}}_{i \ne j} k(s_i, s_j)
        - 2 \mathop{\mathrm{mean}}_{i, j} k(r_i, s_j), \quad k(a, b) = (a \cdot b / d + 1)^3

Precision is the share of samples within the k-th nearest neighbour's distance of some real image, recall the share of
real images within that distance of some sample (Heusel et al. 2017, arXiv 1706.08500; Binkowski et al. 2018, arXiv
1801.01401; Kynkaanniemi et al. 2019, arXiv 1904.06991). The kernel distance is unbiased, and below 0 by chance. The
Frechet distance of finite sets is too large by about (1/m + 1/n) times a constant of the data. Compare values at equal
m and n only, and with the distance of as many training images from the same real ones.

An extractor is a module with the attribute ``num_features`` that maps what ``update`` is given (images in model range,
for :class:`~ddpm_lightning.metrics.ClassifierFeatures`) to ``[B, num_features]``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics.neighbours import nearest

__all__ = ["FrechetDistance", "KernelDistance", "PrecisionRecall"]

_CHUNK = 1000


class FrechetDistance(FrechetInceptionDistance):
    """Frechet distance of Gaussians fitted to the features of two or more real images and samples: torchmetrics'
    metric, with an error of our own where there are too few images."""

    def __init__(self, extractor: nn.Module, **kwargs: Any) -> None:
        super().__init__(feature=extractor, **kwargs)

    def compute(self) -> Tensor:
        counts = int(self.real_features_num_samples), int(self.fake_features_num_samples)
        _check_count("the Frechet distance", 2, *counts)
        return super().compute()


class _FeatureSets(Metric):
    """Keeps the features of both sides, float64, on any number of processes that have seen images of both.

    With ``reset_real_features=False`` a ``reset`` keeps the real images.
    """

    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self, extractor: nn.Module, reset_real_features: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extractor, self.reset_real_features = extractor, reset_real_features
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("fake", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, real: bool) -> None:
        """Add a batch of images in model range; ``real`` or sampled."""
        (self.real if real else self.fake).append(self.extractor(images).double())

    def reset(self) -> None:
        real = list(self.real)
        super().reset()
        if not self.reset_real_features:
            self.real = real

    def _sets(self, metric: str, least: int) -> tuple[Tensor, Tensor]:
        counts = [sum(map(len, part)) if isinstance(part, list) else len(part) for part in (self.real, self.fake)]
        _check_count(metric, least, *counts)
        return dim_zero_cat(self.real), dim_zero_cat(self.fake)


class KernelDistance(_FeatureSets):
    """Unbiased squared MMD with the cubic polynomial kernel over all pairs.

    torchmetrics' KernelInceptionDistance averages over random subsets from torch's global generator instead.
    """

    def compute(self) -> Tensor:
        """A float64 scalar, from two images or more on each side."""
        real, fake = self._sets("the kernel distance", 2)
        return _mean_kernel(real) + _mean_kernel(fake) - 2 * _kernel_sum(real, fake) / (len(real) * len(fake))


class PrecisionRecall(_FeatureSets):
    """Precision and recall of samples by balls around more than k images a side. The radius of a ball is the distance
    of the k-th neighbour, the image itself not counted."""

    def __init__(self, extractor: nn.Module, k: int = 3, **kwargs: Any) -> None:
        super().__init__(extractor, **kwargs)
        self.k = k

    def compute(self) -> dict[str, Tensor]:
        """``precision`` and ``recall``, float64 scalars."""
        real, fake = self._sets(f"precision and recall by {self.k} neighbours", self.k + 1)
        return {"precision": self._covered(fake, real), "recall": self._covered(real, fake)}

    def _covered(self, queries: Tensor, points: Tensor) -> Tensor:
        radius = nearest(points, points, self.k + 1)[0][:, -1]
        inside = [(torch.cdist(part, points) <= radius).any(1) for part in queries.split(_CHUNK)]
        return torch.cat(inside).double().mean()


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    sums = [(part @ b.T / b.shape[1] + 1).pow(3).sum() for part in a.split(_CHUNK)]
    return torch.stack(sums).sum()


def _mean_kernel(a: Tensor) -> Tensor:
    own = (a.square().sum(1) / a.shape[1] + 1).pow(3).sum()
    return (_kernel_sum(a, a) - own) / (len(a) * (len(a) - 1))


def _check_count(metric: str, least: int, real: int, fake: int) -> None:
    for name, count in (("real images", real), ("samples", fake)):
        if count < least:
            raise InputError(f"{metric} needs at least {least} {name}, and got {count}")
