from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives.objective import Objective
from ddpm_lightning.objectives.times import TimeSampler, steps_of
from ddpm_lightning.ops import Generators, expand_to, sum_per_image
from ddpm_lightning.process import DiffusionModel, GenerativeModel, Prediction

__all__ = ["HybridObjective"]


class HybridObjective(Objective):
    r""":math:`L_\text{simple} + \mathrm{vlb\_weight} \, L_\text{vlb}`, one time for each image, for a reverse variance
    that is learned beside the mean (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 16).

    .. math::

        L_\text{simple} &= |\epsilon - \epsilon_\theta(x_i, i)|^2 / D \\
        L_\text{vlb} &= \tfrac{T}{D} \, \mathrm{KL}(q(x_{i-1}|x_i, x_0) \| p(x_{i-1}|x_i))
            \quad \text{for a step } i = 2, \dots, T \\
        &= -\tfrac{T}{D} \log p(x_0|x_1) \quad \text{for } i = 1

    in nats a dimension (:math:`D = C H W`). In L_vlb the mean is detached, so only the variance learns from it. For i
    uniform on 1..T the expectation of L_vlb is -ELBO / D without the prior matching. One evaluation of the network
    serves both parts; x0 is not clipped. The authors' code counts L_vlb in bits, so their 0.001 is 0.00144 here.

    Args:
        times: draws the steps.
        vlb_weight: weight of L_vlb, not negative.
    """

    trains_variance = True

    def __init__(self, times: TimeSampler, vlb_weight: float = 0.001) -> None:
        if not vlb_weight >= 0:
            raise InputError(f"vlb_weight = {vlb_weight:g} must not be negative")
        super().__init__()
        self.times, self.vlb_weight = times, vlb_weight

    def check(self, model: GenerativeModel) -> None:
        """As in the base class; a variance that takes nothing from the network is refused too."""
        super().check(model)
        assert isinstance(model, DiffusionModel)
        variance = model.reverse_process.variance
        if variance.network_outputs == 1:
            raise InputError(
                f"HybridObjective teaches a learned variance, and {type(variance).__name__} has nothing to learn: "
                "use NoiseMSE, or LearnedRangeVariance"
            )

    def forward(self, model: DiffusionModel, x0: Tensor, generators: Generators = None, **cond: Any) -> Tensor:
        draw = self.times(x0, generators)
        steps = steps_of(draw, model.T)
        t = torch.take(model.grid_on(x0.device), steps)
        x_t, eps = model.forward_process.noised(x0, t, generators)
        prediction = model.denoiser(x_t, t, **cond)
        simple = sum_per_image((prediction.eps - eps).square())
        vlb = model.T * _step_cost(model, x0, x_t, steps, replace(prediction, x0=prediction.x0.detach()))
        loss = (simple + self.vlb_weight * vlb) / eps[0].numel()
        self._found(self.times, draw, loss)
        return draw.weight * loss


def _step_cost(model: DiffusionModel, x0: Tensor, x_t: Tensor, steps: Tensor, prediction: Prediction) -> Tensor:
    r"""KL of the step i in 2..T that ends at x_t, or :math:`-\log p(x_0|x_1)` where i = 1: ``[B]`` nats."""
    process, reverse, grid = model.forward_process, model.reverse_process, model.grid_on(x0.device)
    first = steps == 1
    # Both costs are evaluated for all images, the one that an image does not need at a place where it is finite: the
    # gradient of a NaN that where() discards is still a NaN.
    later = steps.clamp(min=2)
    s, t = torch.take(grid, later - 1), torch.take(grid, later)
    kl = process.posterior(x0, x_t, s, t).kl(reverse.transition(x_t, s, t, prediction))
    near = replace(prediction, x0=torch.where(expand_to(first, x0), prediction.x0, x0))
    return torch.where(first, -model.decoder.log_prob(x0, model.decoder_gaussian(x_t, prediction=near)), kl)
