"""The training objective of Ho et al. 2020, equation 14: the mean squared error of the predicted noise."""

from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.objectives.objective import Objective
from ddpm_lightning.objectives.times import TimeSampler
from ddpm_lightning.ops import Generators, randn_like, sum_per_image
from ddpm_lightning.process import DiffusionModel

__all__ = ["NoiseMSE"]


class NoiseMSE(Objective):
    """|eps - eps_theta(x_t, t)|^2 averaged over dimensions, at one time for each image.

    Args:
        times: draws the times.
    """

    def __init__(self, times: TimeSampler) -> None:
        self.times = times

    def __call__(self, model: DiffusionModel, x0: Tensor, generators: Generators = None, **cond: Any) -> Tensor:
        """Mean squared error of eps, ``[B]``."""
        t = torch.take(model.grid.to(x0.device), self.times(model.T, x0, generators))
        eps = randn_like(x0, generators)
        marginal = model.forward_process.marginal(x0, t)
        x_t = marginal.mean + marginal.std * eps
        prediction = model.denoiser(x_t, t, **cond)
        return sum_per_image((prediction.eps - eps).square()) / eps[0].numel()
