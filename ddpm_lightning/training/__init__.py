"""Training with Lightning."""

from ddpm_lightning.training.hierarchy import HierarchyModule
from ddpm_lightning.training.module import DiffusionModule, GenerativeModule

__all__ = ["DiffusionModule", "GenerativeModule", "HierarchyModule"]
