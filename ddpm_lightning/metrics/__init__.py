"""Figures computed from images and bounds."""

from ddpm_lightning.metrics.bits_per_dim import bits_per_dim
from ddpm_lightning.metrics.bound import BoundFigures, BoundMeans
from ddpm_lightning.metrics.dequantization import decoded_log_prob, dequantized_log_prob
from ddpm_lightning.metrics.mean import MeanAndError

__all__ = ["BoundFigures", "BoundMeans", "MeanAndError", "bits_per_dim", "decoded_log_prob", "dequantized_log_prob"]
