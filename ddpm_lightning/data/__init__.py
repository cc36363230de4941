"""Images as uint8 grey levels in memory, the batches drawn from them, and the exact map to model range."""

from ddpm_lightning.data.batches import Batch, Split
from ddpm_lightning.data.cifar import CIFAR10
from ddpm_lightning.data.datamodule import ImageDataModule, SplitName
from ddpm_lightning.data.digits import Digits
from ddpm_lightning.data.images import Images
from ddpm_lightning.data.mnist import MNIST, FashionMNIST
from ddpm_lightning.data.official import OfficialData
from ddpm_lightning.data.transforms import levels_to_model, model_to_levels

__all__ = [
    "CIFAR10",
    "MNIST",
    "Batch",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "Images",
    "OfficialData",
    "Split",
    "SplitName",
    "levels_to_model",
    "model_to_levels",
]
