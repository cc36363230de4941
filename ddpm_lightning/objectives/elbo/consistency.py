from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ddpm_lightning.objectives.elbo.estimator import ChainWalk, ElboEstimator
from ddpm_lightning.objectives.elbo.terms import ElboTerms, TermKind
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import GenerativeModel

__all__ = ["ConsistencyElbo"]


class ConsistencyElbo(ElboEstimator):
    r"""``reconstruction - prior_matching - consistency``: each forward step is matched to the reverse step that lands
    on the same state (Luo 2022, arXiv 2208.11970, equations 36 to 45).

    .. math::

        \mathrm{prior\_matching} &= E_{q(x_{T-1}|x_0)} \, \mathrm{KL}(q(x_T|x_{T-1}) \| p(x_T)) \\
        \text{consistency} &= \sum_{t=1}^{T-1}
            E_{q(x_{t-1}, x_t, x_{t+1}|x_0)} [\log q(x_t|x_{t-1}) - \log p(x_t|x_{t+1})]

    The expectation is over the joint triple, because in the bound x_t lies on the path between its neighbours. The
    often printed

    .. math:: E_{q(x_{t-1}, x_{t+1}|x_0)} \, \mathrm{KL}(q(x_t|x_{t-1}) \| p(x_t|x_{t+1}))

    averages over a fresh x_t that knows nothing of :math:`x_{t+1}`. This is larger by about one nat for each dimension
    and step. It is the diagnostic ``consistency_literal_kl`` and never enters the bound.

    Args:
        steps: as in every estimator.
        T: as in every estimator.
        closed_entropy: take :math:`E \log q(x_t|x_{t-1})` given the state before in closed form, as minus the entropy
            of the Gaussian, not at the draw. The expectation is the same.
    """

    name = "consistency"
    term_kinds: Mapping[str, TermKind] = {
        "reconstruction": "log_prob",
        "prior_matching": "cost",
        "consistency": "cost",
        "elbo": "log_prob",
        "consistency_literal_kl": "diagnostic",
    }

    def __init__(self, steps: int | None = None, T: int | None = None, closed_entropy: bool = False) -> None:
        super().__init__(steps, T)
        self.closed_entropy = closed_entropy

    def estimate(self, model: GenerativeModel, x0: Tensor, generators: Generators, **cond: Any) -> ElboTerms:
        draw = self.choice.draw(model.T - 1, self.steps, x0, generators)
        walk = ChainWalk(model, x0, draw.index, generators)
        step_costs, literal_kls = [], []
        for w in walk:
            forward_step, reverse_step = model.encoder_step(w.n, w.before, x0), model.reverse(w.n, w.after, **cond)
            log_q = -forward_step.entropy() if self.closed_entropy else forward_step.log_prob(w.at)
            step_costs.append(log_q - reverse_step.log_prob(w.at))
            literal_kls.append(forward_step.kl(reverse_step))
        last_step = model.encoder_step(model.T, walk.x_last_but_one, x0)
        return self.assemble(
            model.log_likelihood(x0, walk.x_first, **cond),
            "consistency",
            step_costs,
            draw,
            end_costs={"prior_matching": last_step.kl(model.prior(last_step.mean))},
            diagnostics={"consistency_literal_kl": literal_kls},
        )
