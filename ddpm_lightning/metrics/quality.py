"""All scores of samples' quality at once."""

from torch import Tensor, nn

from ddpm_lightning.metrics.classes import ClassMetrics
from ddpm_lightning.metrics.distances import FrechetDistance, KernelDistance, PrecisionRecall
from ddpm_lightning.metrics.features import ClassifierFeatures
from ddpm_lightning.networks import FeatureClassifier

__all__ = ["QualityMetrics"]


class QualityMetrics(nn.Module):
    """Distances of samples from real images, and the classes of the samples, on any number of processes.

    Args:
        classifier: gives the features and judges the classes.
    """

    def __init__(self, classifier: FeatureClassifier) -> None:
        super().__init__()
        extractor = ClassifierFeatures(classifier)
        self.frechet, self.kernel = FrechetDistance(extractor), KernelDistance(extractor)
        self.precision_recall, self.classes = PrecisionRecall(extractor), ClassMetrics(classifier)

    def update(self, images: Tensor, real: bool, label: Tensor | None = None) -> None:
        """Add a batch of images in model range; ``label`` is the class that samples are meant to have."""
        for metric in (self.frechet, self.kernel, self.precision_recall):
            metric.update(images, real)
        if not real:
            self.classes.update(images, label)

    def compute(self) -> dict[str, float]:
        """``frechet``, ``kernel``, ``precision``, ``recall``, and ClassMetrics' of the samples; a collective.

        Raises:
            InputError: too few images.
        """
        scores = {"frechet": self.frechet.compute(), "kernel": self.kernel.compute()}
        scores |= {**self.precision_recall.compute(), **self.classes.compute()}
        return {name: float(value) for name, value in scores.items()}
