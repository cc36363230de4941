"""Samplers: from noise to images on any time grid."""

from ddpm_lightning.samplers.ancestral import AncestralSampler
from ddpm_lightning.samplers.base import Sampler
from ddpm_lightning.samplers.ddim import DDIMSampler
from ddpm_lightning.samplers.inpainting import ReplacementSampler

__all__ = ["AncestralSampler", "DDIMSampler", "ReplacementSampler", "Sampler"]
