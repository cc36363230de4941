"""Images as grey levels, fields as real numbers, the batches drawn from them, and the exact maps to model range."""

from ddpm_lightning.data.batches import Batch, Split
from ddpm_lightning.data.cifar import CIFAR10
from ddpm_lightning.data.datamodule import ImageDataModule, SplitName
from ddpm_lightning.data.digits import Digits
from ddpm_lightning.data.fields import Fields
from ddpm_lightning.data.images import Images
from ddpm_lightning.data.lattice import FreeField, Ising, Phi4
from ddpm_lightning.data.mnist import MNIST, FashionMNIST
from ddpm_lightning.data.official import OfficialData
from ddpm_lightning.data.transforms import levels_to_model, model_to_levels

__all__ = [
    "CIFAR10", "MNIST", "Batch", "Digits", "FashionMNIST", "Fields", "FreeField", "ImageDataModule", "Images", "Ising",
    "OfficialData", "Phi4", "Split", "SplitName", "levels_to_model", "model_to_levels",
]  # fmt: skip
