from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.objectives.elbo.estimator import ElboEstimator
from ddpm_lightning.objectives.elbo.terms import ElboTerms, TermKind
from ddpm_lightning.ops import Generators, as_times, expand_to, rand, sum_per_image
from ddpm_lightning.process import Denoiser, DiffusionModel

__all__ = ["ContinuousElbo", "diffusion_cost"]


def diffusion_cost(
    model: DiffusionModel, denoiser: Denoiser, x0: Tensor, t: Tensor, generators: Generators = None, **cond: Any
) -> Tensor:
    r"""The diffusion term at one draw of x_t, ``[B]`` nats per unit of time:

    .. math::

        \tfrac12 \gamma'(t) \, \left| \epsilon - \epsilon_\theta(x_t, t)
            + \frac{\alpha_t}{\sigma_t} \frac{dm}{d\gamma} \right|^2, \qquad m = m(x_0, t)

    The last part is 0 for the identity encoder. A gamma for each pixel weighs each pixel's square by its own slope.
    """
    schedule, encoder = model.schedule, model.encoder
    x_t, eps = model.forward_process.noised(x0, t, generators)
    error = eps - denoiser(x_t, t, **cond).eps
    slope = schedule.gamma_slope(t)
    if not encoder.is_identity:
        alpha_t, sigma_t = schedule.scales(t, x0)
        rate = encoder.rate(schedule, x0, as_times(t, x0)) / expand_to(slope, x0).to(x0.dtype)
        error = error + alpha_t / sigma_t * rate
    if schedule.pixel_shape is not None:
        return 0.5 * sum_per_image(slope * error.square())
    return 0.5 * slope * sum_per_image(error.square())


class ContinuousElbo(ElboEstimator):
    r"""``reconstruction - prior_matching - diffusion`` for T -> infinity (Kingma et al. 2021, equation 18).

    .. math::

        \text{diffusion} = \tfrac12 E_{t, \epsilon} \left[ \gamma'(t) \, |\epsilon - \epsilon_\theta(x_t, t)|^2 \right],
        \quad t \text{ uniform between the first state and } 1

    The limit is the same for every reverse variance between beta and beta-tilde, which agree to first order in the
    step, and for AnalyticVariance. The decoder stands at the first state of the model's own chain.

    Args:
        steps: number of times, at least 1; one in each of that many equal parts of the time axis, unless another choice
            is made (:meth:`choosing`).
    """

    name = "continuous"
    needs_posterior = True
    term_kinds: Mapping[str, TermKind] = {
        "reconstruction": "log_prob",
        "prior_matching": "cost",
        "diffusion": "cost",
        "elbo": "log_prob",
    }

    def __init__(self, steps: int = 10) -> None:
        super().__init__(steps)

    def evaluated(self, own_T: int) -> tuple[int | None, int]:
        return None, self.steps or 1

    def parts(self, own_T: int) -> int:
        return self.choice.parts_of_time(self.steps or 1)

    def steps_at(self, model: DiffusionModel) -> tuple[Tensor, float]:
        parts = self.parts(model.T)
        first = float(model.grid[1])
        return torch.linspace(first, 1, parts + 1, dtype=torch.float64), 1 / parts

    def estimate(self, model: DiffusionModel, x0: Tensor, generators: Generators, **cond: Any) -> ElboTerms:
        process, denoiser, parts = model.forward_process, model.reverse_process.denoiser, self.parts(model.T)
        draw = self.choice.draw(parts, self.steps, x0, generators)
        first = model.grid_on(x0.device)[1]
        span = 1 - first
        x1 = process.marginal(x0, first).sample(generators)
        step_costs = []
        for k, part in enumerate(draw.index):
            within = rand(x0, generators) if draw.within is None else draw.within[k]
            t = first + span * (part - 1 + within) / parts
            step_costs.append(span * diffusion_cost(model, denoiser, x0, t, generators, **cond))
        return self.assemble(
            model.log_likelihood(x0, x1, **cond),
            "diffusion",
            step_costs,
            replace(draw, weight=draw.weight / parts),
            end_costs={"prior_matching": process.marginal(x0, model.grid_on(x0.device)[-1]).kl(model.prior(x0))},
        )
