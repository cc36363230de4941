"""Training with Lightning."""

from ddpm_lightning.training.module import DiffusionModule
from ddpm_lightning.training.runs import load_run
from ddpm_lightning.training.trainer import DiffusionTrainer

__all__ = ["DiffusionModule", "DiffusionTrainer", "load_run"]
