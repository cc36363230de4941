from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ddpm_lightning.objectives.elbo.estimator import ElboEstimator
from ddpm_lightning.objectives.elbo.terms import ElboTerms, TermKind
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel

__all__ = ["DenoisingElbo"]


class DenoisingElbo(ElboEstimator):
    r"""``reconstruction - prior_matching - denoising_matching``: each reverse step is matched to the posterior that
    knows x_0 (Ho et al. 2020, equation 5).

    .. math::

        \mathrm{prior\_matching} &= \mathrm{KL}(q(x_T|x_0) \| p(x_T)) \\
        \mathrm{denoising\_matching} &= \sum_{t=2}^T
            E_{q(x_t|x_0)} \, \mathrm{KL}(q(x_{t-1}|x_t, x_0) \| p(x_{t-1}|x_t))

    Each term averages over one random variable only: x_t, drawn afresh for each step.
    """

    name = "denoising"
    needs_posterior = True
    term_kinds: Mapping[str, TermKind] = {
        "reconstruction": "log_prob",
        "prior_matching": "cost",
        "denoising_matching": "cost",
        "elbo": "log_prob",
    }

    def estimate(self, model: DiffusionModel, x0: Tensor, generators: Generators, **cond: Any) -> ElboTerms:
        process, reverse, grid = model.forward_process, model.reverse_process, model.grid_on(x0.device)
        draw = self.choice.draw(model.T - 1, self.steps, x0, generators)
        x1 = process.marginal(x0, grid[1]).sample(generators)
        step_costs = []
        for n in draw.index:
            s, t = grid[n], grid[n + 1]
            x_t = process.marginal(x0, t).sample(generators)
            step_costs.append(process.posterior(x0, x_t, s, t).kl(reverse.transition(x_t, s, t, **cond)))
        return self.assemble(
            model.log_likelihood(x0, x1, **cond),
            "denoising_matching",
            step_costs,
            draw,
            end_costs={"prior_matching": process.marginal(x0, grid[-1]).kl(model.prior(x0))},
        )
