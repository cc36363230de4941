"""See ``ddpm_lightning.export.diffusers``. diffusers looks for ModelMixin beside the class that it loads."""

from diffusers.models.modeling_utils import ModelMixin

from ddpm_lightning.export.diffusers import DiffusersUNet

__all__ = ["DiffusersUNet", "ModelMixin"]
