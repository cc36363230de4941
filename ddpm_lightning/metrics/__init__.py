"""Numbers computed from images and bounds."""

from ddpm_lightning.metrics.bits_per_dim import bits_per_dim
from ddpm_lightning.metrics.bound import BoundMeans, BoundScores, Score
from ddpm_lightning.metrics.classes import ClassMetrics
from ddpm_lightning.metrics.dequantization import decoded_log_prob, dequantized_log_prob
from ddpm_lightning.metrics.distances import FrechetDistance, KernelDistance, PrecisionRecall
from ddpm_lightning.metrics.features import ClassifierFeatures, classifier_for, load_classifier
from ddpm_lightning.metrics.mean import MeanAndError
from ddpm_lightning.metrics.neighbours import nearest
from ddpm_lightning.metrics.quality import QualityMetrics

__all__ = [
    "BoundMeans",
    "BoundScores",
    "ClassMetrics",
    "ClassifierFeatures",
    "FrechetDistance",
    "KernelDistance",
    "MeanAndError",
    "PrecisionRecall",
    "QualityMetrics",
    "Score",
    "bits_per_dim",
    "classifier_for",
    "decoded_log_prob",
    "dequantized_log_prob",
    "load_classifier",
    "nearest",
]
