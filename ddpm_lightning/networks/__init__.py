"""Networks ``(x, t, label=None) -> tensor`` and a classifier of images: a leaf that imports only torch and knows
nothing of diffusion."""

from ddpm_lightning.networks.adapted import AdaptedNetwork
from ddpm_lightning.networks.classifier import FeatureClassifier
from ddpm_lightning.networks.embedding import FourierFeatures, SinusoidalEmbedding
from ddpm_lightning.networks.levels_unet import LevelsUNet
from ddpm_lightning.networks.residual import ResidualStack
from ddpm_lightning.networks.simple_unet import SimpleUNet
from ddpm_lightning.networks.unet import UNet

__all__ = [
    "AdaptedNetwork",
    "FeatureClassifier",
    "FourierFeatures",
    "LevelsUNet",
    "ResidualStack",
    "SimpleUNet",
    "SinusoidalEmbedding",
    "UNet",
]
