r"""The mean squared error of the denoiser, in any of its parameterisations and under any weighting.

Since x_t = alpha_t x_0 + sigma_t eps ties the errors of x_0 and of eps together, the squared error of each target is
that of eps times a factor:

    eps    1
    x_0    sigma_t^2 / alpha_t^2 = exp(gamma_t)
    v      (alpha_t + sigma_t^2 / alpha_t)^2, with variance preservation 1/alpha_t^2 = 1 + exp(gamma_t)
    score  1 / sigma_t^2

A target is therefore one more weighting (Salimans & Ho 2022, arXiv 2202.00512, section 4).
"""

from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.objectives.objective import Objective
from ddpm_lightning.objectives.times import TimeSampler, steps_of
from ddpm_lightning.objectives.weighting import UniformWeighting, Weighting
from ddpm_lightning.ops import Generators, sum_per_image
from ddpm_lightning.process import DiffusionModel, Parameterization

__all__ = ["WeightedMSE"]


class WeightedMSE(Objective):
    r"""w(t) |target - prediction|^2 averaged over dimensions, at one time for each image:

    .. math::

        E \, \text{loss} &= \tfrac1T \sum_{i=1}^T w(t_i) \, E|\dots|^2 / D \quad \text{on the chain's grid} \\
        E \, \text{loss} &= \int w(t) \, E|\dots|^2 / D \, dt
            \quad \text{in continuous time, from the first state to } 1

    Args:
        times: draws the times.
        target: what the error is measured in; None for eps. It need not be what the network's output means.
        weighting: w(t), made for the error of eps; None for 1.
        continuous: draw times from the whole axis, not from the chain's grid: for schedules and conditionings that are
            defined there, and a model that is to be evaluated or sampled with any number of steps.
        T: train on the states of a chain of that many steps; None for the model's own.

    Raises:
        InputError: when called, a T with too few states.
    """

    def __init__(
        self,
        times: TimeSampler,
        target: Parameterization | None = None,
        weighting: Weighting | None = None,
        continuous: bool = False,
        T: int | None = None,
    ) -> None:
        super().__init__()
        self.times, self.target, self.weighting, self.continuous, self.T = times, target, weighting, continuous, T

    def forward(self, model: DiffusionModel, x0: Tensor, generators: Generators = None, **cond: Any) -> Tensor:
        """Weighted mean squared error, ``[B]``, float64. In training mode the time sampler learns from it."""
        if self.T is not None:
            model = model.with_steps(self.T)
        draw = self.times(x0, generators)
        grid = model.grid_on(x0.device)
        span: Tensor | float = 1.0
        if self.continuous:
            span = 1 - grid[1]
            t = grid[1] + span * draw.position
        else:
            t = torch.take(grid, steps_of(draw, model.T))
        x_t, eps = model.forward_process.noised(x0, t, generators)
        prediction = model.denoiser(x_t, t, **cond)
        error = prediction.eps - eps
        if self.target is not None:
            scales = model.denoiser.scales(x_t, t)
            error = self.target.target(prediction.x0, prediction.eps, *scales) - self.target.target(x0, eps, *scales)
        weight = (self.weighting or UniformWeighting())(model.schedule, t)
        loss = span * weight * sum_per_image(error.square()) / x0[0].numel()
        if self.training:
            self.times.update(draw.position, loss.detach())
        return draw.weight * loss
