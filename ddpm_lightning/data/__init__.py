"""Images as grey levels, fields as real numbers, the batches drawn from them, and the exact maps to model range."""

from ddpm_lightning.data.batches import Batch, Split
from ddpm_lightning.data.datamodule import ImageDataModule, SplitName
from ddpm_lightning.data.digits import Digits
from ddpm_lightning.data.fields import Fields
from ddpm_lightning.data.lattice import FreeField, Ising, Phi4
from ddpm_lightning.data.mnist import MNIST
from ddpm_lightning.data.transforms import levels_to_model, model_to_levels

__all__ = [
    "MNIST", "Batch", "Digits", "Fields", "FreeField", "ImageDataModule", "Ising", "Phi4", "Split", "SplitName",
    "levels_to_model", "model_to_levels",
]  # fmt: skip
