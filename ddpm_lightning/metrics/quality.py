from collections.abc import Collection
from typing import cast

from torch import Tensor, nn
from torchmetrics import Metric

from ddpm_lightning.metrics.classes import ClassMetrics
from ddpm_lightning.metrics.distances import FrechetDistance, KernelDistance, PrecisionRecall
from ddpm_lightning.metrics.features import ClassifierFeatures
from ddpm_lightning.networks import FeatureClassifier

__all__ = ["QualityMetrics"]


class QualityMetrics(nn.Module):
    """Distances of samples from real images, and the classes of the samples, on any number of processes.

    ``reset`` forgets the samples and keeps the real images. ``only`` names what to measure of ``frechet``, ``kernel``,
    ``precision_recall`` and ``classes``; None for all.
    """

    def __init__(self, classifier: FeatureClassifier, only: Collection[str] | None = None) -> None:
        super().__init__()
        extractor = ClassifierFeatures(classifier)
        distances = {"frechet": FrechetDistance, "kernel": KernelDistance, "precision_recall": PrecisionRecall}
        chosen = [*distances, "classes"] if only is None else only
        self.distances = nn.ModuleDict(
            {name: kind(extractor, reset_real_features=False) for name, kind in distances.items() if name in chosen}
        )
        self.classes = ClassMetrics(classifier) if "classes" in chosen else None

    def _distances(self) -> dict[str, Metric]:
        return cast(dict[str, Metric], self.distances)

    def update(self, images: Tensor, real: bool, label: Tensor | None = None) -> None:
        """Add a batch of images in model range; ``label`` is the class that samples are meant to have."""
        for metric in self._distances().values():
            metric.update(images, real)
        if self.classes is not None and not real:
            self.classes.update(images, label)

    def compute(self) -> dict[str, float]:
        """``frechet``, ``kernel``, ``precision``, ``recall``, and ClassMetrics' of the samples; a collective."""
        values: dict[str, Tensor] = {}
        for name, metric in self._distances().items():
            value = metric.compute()
            values |= value if isinstance(value, dict) else {name: value}
        if self.classes is not None:
            values |= self.classes.compute()
        return {name: float(value) for name, value in values.items()}

    def reset(self) -> None:
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()
