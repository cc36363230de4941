from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import FeatureClassifier

__all__ = ["ClassMetrics"]


class ClassMetrics(Metric):
    """Accuracy of a classifier on images of known class, and the diversity of images, on any number of processes."""

    full_state_update = False
    hits: Tensor
    labelled: Tensor
    counts: Tensor
    sums: Tensor
    squares: Tensor

    def __init__(self, classifier: FeatureClassifier, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classifier = classifier
        classes = classifier.num_classes
        shapes = {"hits": (), "labelled": (), "counts": (classes,), "squares": (classes,)}
        for name, shape in {**shapes, "sums": (classes, classifier.num_features)}.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, label: Tensor | None = None) -> None:
        """Add images ``[B, C, H, W]`` in model range; ``label`` ``[B]`` is the class that they are meant to have."""
        features = self.classifier.features(images)
        predicted = self.classifier.head(features).argmax(1)
        if label is not None:
            self.hits += (predicted == label).sum()
            self.labelled += len(predicted)
        features = features.double()
        self.counts += torch.bincount(predicted, minlength=len(self.counts))
        self.sums.index_add_(0, predicted, features)
        self.squares.index_add_(0, predicted, features.square().sum(1))

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars of one image or more.

        - ``accuracy``: share of the labelled images whose predicted class is the label; left out without labels.
        - ``class_entropy``: entropy of the histogram of predicted classes, nats; at most log K.
        - ``spread``: root mean square distance of an image's features from the mean features of its predicted class;
          0 where each class is one image over and over.
        """
        n = self.counts.sum()
        if n == 0:
            raise InputError("classes need at least 1 image, and got 0")
        share = self.counts / n
        centred = self.squares - self.sums.square().sum(1) / self.counts.clamp(min=1)
        scores = {
            "class_entropy": -torch.special.xlogy(share, share).sum(),
            "spread": (centred.sum() / n).clamp(min=0).sqrt(),
        }
        return {"accuracy": self.hits / self.labelled, **scores} if self.labelled > 0 else scores
