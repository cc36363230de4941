from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

__all__ = ["ElboTerms", "TermKind"]

TermKind = Literal["log_prob", "cost", "diagnostic"]
"""A log probability, of which the bound is one; a cost, which the bound subtracts; or no part of the bound."""


@dataclass(frozen=True)
class ElboTerms:
    """One estimate of the bound for each image: ``total = reconstruction - sum of costs <= log p(x_0)``.

    All values are float64 nats for a whole image (not for a dimension).
    """

    reconstruction: Tensor  # log p(x_0 | x_1), [B]
    costs: Mapping[str, Tensor]  # what is subtracted from the reconstruction, by name, [B] each
    step_costs: Tensor  # the summand of the step-wise cost at each evaluated step, not weighted, [B, K]
    step_indices: Tensor  # int64 [B, K]; entry n belongs to p(x_n | x_{n+1}), n in 1..T-1
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)  # no part of the bound, by name, [B] each

    @property
    def total(self) -> Tensor:
        total = self.reconstruction
        for cost in self.costs.values():
            total = total - cost
        return total

    def named(self) -> dict[str, Tensor]:
        """All ``[B]`` values by name: reconstruction, the costs, ``elbo``, and the diagnostics."""
        return {"reconstruction": self.reconstruction, **self.costs, "elbo": self.total, **self.diagnostics}
