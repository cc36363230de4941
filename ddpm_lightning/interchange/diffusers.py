"""See ``ddpm_lightning.export.diffusers``."""

from ddpm_lightning.export.diffusers import DiffusersUNet, NoiseOutput

__all__ = ["DiffusersUNet", "NoiseOutput"]
