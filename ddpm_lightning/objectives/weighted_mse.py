r"""The mean squared error of the denoiser, in any of its parameterisations and under any weighting.

By :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` the squared error of each target is the squared error of eps times a
factor:

======  ==========================================================================================
target  factor
======  ==========================================================================================
eps     1
x_0     :math:`\sigma_t^2 / \alpha_t^2 = e^{\gamma_t}`
v       :math:`(\alpha_t + \sigma_t^2 / \alpha_t)^2`, with variance preservation :math:`1 + e^{\gamma_t}`
score   :math:`1 / \sigma_t^2`
======  ==========================================================================================

A target is therefore one more weighting (Salimans & Ho 2022, arXiv 2202.00512, section 4).
"""

from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import at_least
from ddpm_lightning.objectives.objective import Objective
from ddpm_lightning.objectives.times import TimeSampler, steps_of
from ddpm_lightning.objectives.weighting import UniformWeighting, Weighting
from ddpm_lightning.ops import Generators, sum_per_image
from ddpm_lightning.process import DiffusionModel, Parameterization

__all__ = ["WeightedMSE"]


class WeightedMSE(Objective):
    r"""The weighted squared error, averaged over dimensions, at one time for each image:

    .. math:: w(t) \, |\text{target} - \text{prediction}|^2 / D

    Its expectation is the mean over the states of the chain, or in continuous time the integral over t from the first
    state to 1.

    Args:
        times: draws the times.
        target: what the error is measured in; None for eps. It need not be what the network's output means.
        weighting: w(t), made for the error of eps; None for 1.
        continuous: draw times from the whole axis, not from the chain's grid, for a model that is evaluated or sampled
            with any number of steps. The schedule and the conditioning must be defined there.
        T: train on the states of a chain of that many steps; None for the model's own.
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
        if T is not None:
            at_least(1, "None stands for the model's own", T=T)
        if target is not None:  # one without an error of its own is refused here, not in the first step
            target.target(*torch.ones(4, 1))
        self.times, self.target, self.weighting, self.continuous, self.T = times, target, weighting, continuous, T

    def forward(self, model: DiffusionModel, x0: Tensor, generators: Generators = None, **cond: Any) -> Tensor:
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
        self._found(self.times, draw, loss)
        return draw.weight * loss
