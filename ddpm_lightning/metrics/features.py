"""The feature space in which samples are compared with data: a classifier of that very kind of data.

FID and KID take their features from Inception, trained on ImageNet, to which strokes on a black ground mean little.
Here each kind of data has a small classifier of its own. Compare scores of the same data and the same classifier only,
never with a published FID.
"""

import json
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import FeatureClassifier

__all__ = ["ClassifierFeatures", "classifier_for", "load_classifier"]

_SHIPPED: dict[tuple[tuple[int, ...], int], str] = {((1, 28, 28), 256): "mnist", ((1, 8, 8), 17): "digits"}
"""Names of the classifiers in metrics/weights, by the shape and the grey levels of the images that they know."""


class ClassifierFeatures(nn.Module):
    """A classifier's features as a module of their own: an extractor for the distances."""

    def __init__(self, classifier: FeatureClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_features = classifier.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, num_features]`` of images ``[B, C, H, W]`` in model range."""
        return self.classifier.features(images)


def classifier_for(shape: tuple[int, ...], levels: int) -> str:
    """Name of the shipped classifier for images of ``shape`` (C, H, W) and so many grey levels, else InputError."""
    try:
        return _SHIPPED[tuple(shape), levels]
    except KeyError:
        known = ", ".join(f"{name} ({list(key[0])}, {key[1]} levels)" for key, name in _SHIPPED.items())
        raise InputError(
            f"no classifier is shipped for images of shape {list(shape)} with {levels} grey levels, only {known}: "
            "train one as scripts/train_classifier.py does and give its file as classifier"
        ) from None


def load_classifier(name: str) -> FeatureClassifier:
    """A trained classifier, in evaluation mode and without gradients, else InputError. Draws no random number.

    ``name`` is ``mnist`` or ``digits``, or the path of a safetensors file with the constructor's arguments as JSON
    under ``init_args`` in its metadata, as ``scripts/train_classifier.py`` writes it.
    """
    if name in _SHIPPED.values():
        with as_file(files("ddpm_lightning.metrics") / "weights" / f"{name}.safetensors") as path:
            return _read(path)
    return _read(Path(name))


def _read(path: Path) -> FeatureClassifier:
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")  # nor is a pipe waited for
        with safe_open(path, "pt") as file:
            init_args = json.loads((file.metadata() or {})["init_args"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
        with torch.device("meta"):
            classifier = FeatureClassifier(**init_args)
        classifier.load_state_dict(state, assign=True)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"classifier {path}: neither {' nor '.join(_SHIPPED.values())}, nor a file that "
            f"scripts/train_classifier.py wrote ({error})"
        ) from None
    return classifier.eval().requires_grad_(False)
