"""A run: the folder of one training, and all that is written into it."""

from ddpm_lightning.runs.run import Run

__all__ = ["Run"]
