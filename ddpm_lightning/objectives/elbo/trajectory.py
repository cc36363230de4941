from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ddpm_lightning.objectives.elbo.estimator import ChainWalk, ElboEstimator
from ddpm_lightning.objectives.elbo.terms import ElboTerms, TermKind
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import GenerativeModel

__all__ = ["TrajectoryElbo"]


class TrajectoryElbo(ElboEstimator):
    r"""The log ratio of one path (Luo 2022, arXiv 2208.11970, equation 34):

    .. math::

        \log p(x_0|x_1) - \mathrm{path\_log\_ratio}, \quad \mathrm{path\_log\_ratio} = \sum_{t=1}^T \log q(x_t|x_{t-1})
            - \sum_{t=2}^T \log p(x_{t-1}|x_t) - \log p(x_T)
    """

    name = "trajectory"
    term_kinds: Mapping[str, TermKind] = {"reconstruction": "log_prob", "path_log_ratio": "cost", "elbo": "log_prob"}

    def steps_at(self, model: Any) -> None:
        """Densities of neighbouring states cancel in the sum alone."""

    def estimate(self, model: GenerativeModel, x0: Tensor, generators: Generators, **cond: Any) -> ElboTerms:
        draw = self.choice.draw(model.T - 1, self.steps, x0, generators)
        walk = ChainWalk(model, x0, draw.index, generators)
        step_costs = [
            model.encoder_step(w.n + 1, w.at, x0).log_prob(w.after) - model.reverse(w.n, w.after, **cond).log_prob(w.at)
            for w in walk
        ]
        log_q_first, log_p_last = walk.q_first.log_prob(walk.x_first), model.prior(walk.x_last).log_prob(walk.x_last)
        return self.assemble(
            model.log_likelihood(x0, walk.x_first, **cond),
            "path_log_ratio",
            step_costs,
            draw,
            end_costs={"path_log_ratio": log_q_first - log_p_last},
        )
