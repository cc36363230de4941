"""Training with Lightning."""

from ddpm_lightning.training.module import DiffusionModule
from ddpm_lightning.training.trainer import DiffusionTrainer

__all__ = ["DiffusionModule", "DiffusionTrainer"]
