"""Sampling: a request for images, resolved once, and the files that it fills."""

from ddpm_lightning.sampling.known import Inpainting
from ddpm_lightning.sampling.request import Drawing, SampleRequest

__all__ = ["Drawing", "Inpainting", "SampleRequest"]
