import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import at_least
from ddpm_lightning.objectives.elbo.estimator import ElboEstimator
from ddpm_lightning.objectives.elbo.terms import ElboTerms, TermKind
from ddpm_lightning.objectives.elbo.trajectory import TrajectoryElbo
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import GenerativeModel

__all__ = ["ImportanceWeightedElbo"]


class ImportanceWeightedElbo(ElboEstimator):
    r"""The importance-weighted bound of K paths of each image (Burda et al. 2016, arXiv 1509.00519, equation 8):

    .. math::

        \log \frac1K \sum_{k=1}^K w_k, \qquad
            w_k = \frac{p(x_0, x_1^k, \dots, x_T^k)}{q(x_1^k, \dots, x_T^k | x_0)}, \quad x^k \sim q

    The paths are independent draws of the trajectory form, whose bound this is at K = 1. In expectation the bound rises
    with K, towards :math:`\log p(x_0)`: slowly, where the logs of the weights are spread over many nats.

    ``reconstruction`` and ``path_log_ratio`` are means over the paths. ``jensen_gap`` is the mean of log w_k less the
    log of the mean of w_k: never above 0, it is what K paths gain over one. ``log_effective_paths`` is the log of
    :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, between 0 (one path has all the weight, and more paths would still raise the
    bound) and log K.

    Args:
        samples: K, the number of paths, at least 1; each takes all T evaluations of the network.
        T: evaluate the model as a chain of that many states; None for its own.
    """

    term_kinds: Mapping[str, TermKind] = {
        "reconstruction": "log_prob",
        "path_log_ratio": "cost",
        "jensen_gap": "cost",
        "elbo": "log_prob",
        "log_effective_paths": "diagnostic",
    }

    def __init__(self, samples: int = 10, T: int | None = None) -> None:
        at_least(1, samples=samples)
        super().__init__(None, T)
        self.samples = self.draws = samples
        # a table holds one form of each name, and the bounds of several K belong side by side
        self.name = f"iwae_{samples}"

    def steps_at(self, model: Any) -> None:
        """As for the trajectory form: a step has no cost of its own."""

    def estimate(self, model: GenerativeModel, x0: Tensor, generators: Generators, **cond: Any) -> ElboTerms:
        one = TrajectoryElbo()
        paths = [one.estimate(model, x0, generators, **cond) for _ in range(self.samples)]
        log_w = torch.stack([path.total for path in paths]).double()

        def mean(values: list[Tensor]) -> Tensor:
            return torch.stack(values).mean(0)

        log_sum = log_w.logsumexp(0)
        return ElboTerms(
            mean([path.reconstruction for path in paths]),
            {
                "path_log_ratio": mean([path.costs["path_log_ratio"] for path in paths]),
                "jensen_gap": log_w.mean(0) - (log_sum - math.log(self.samples)),
            },
            mean([path.step_costs for path in paths]),
            paths[0].step_indices,
            {"log_effective_paths": 2 * log_sum - (2 * log_w).logsumexp(0)},
        )
