"""The interface of training objectives."""

from typing import Any

from torch import Tensor

from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel

__all__ = ["Objective"]


class Objective:
    """A loss for each image, to be averaged and minimised."""

    def __call__(self, model: DiffusionModel, x0: Tensor, generators: Generators = None, **cond: Any) -> Tensor:
        """Losses ``[B]`` of the images ``x0`` ``[B, C, H, W]`` in model range."""
        raise NotImplementedError
