"""Training with Lightning."""

from ddpm_lightning.training.module import DiffusionModule

__all__ = ["DiffusionModule"]
