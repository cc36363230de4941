"""Networks ``(x, t, label=None) -> tensor``: a leaf that imports only torch and knows nothing of diffusion."""

from ddpm_lightning.networks.embedding import FourierFeatures, SinusoidalEmbedding
from ddpm_lightning.networks.simple_unet import SimpleUNet
from ddpm_lightning.networks.unet import UNet

__all__ = ["FourierFeatures", "SimpleUNet", "SinusoidalEmbedding", "UNet"]
