"""Images as uint8 grey levels in memory, the batches drawn from them, and the exact map to model range."""

from ddpm_lightning.data.batches import Batch, Split
from ddpm_lightning.data.datamodule import ImageDataModule, SplitName
from ddpm_lightning.data.digits import Digits
from ddpm_lightning.data.lattice import Ising, free_field_samples, phi4_samples
from ddpm_lightning.data.mnist import MNIST
from ddpm_lightning.data.transforms import levels_to_model, model_to_levels

__all__ = [
    "MNIST",
    "Batch",
    "Digits",
    "ImageDataModule",
    "Ising",
    "Split",
    "SplitName",
    "free_field_samples",
    "levels_to_model",
    "model_to_levels",
    "phi4_samples",
]
