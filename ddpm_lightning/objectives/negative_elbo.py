"""The bound itself as a training objective."""

from typing import Any

from torch import Tensor

from ddpm_lightning.objectives.elbo import ElboEstimator
from ddpm_lightning.objectives.objective import Objective
from ddpm_lightning.objectives.times import BatchShare
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel

__all__ = ["NegativeElbo"]


class NegativeElbo(Objective):
    """-ELBO in nats a dimension, by any estimator of it: minimising it maximises the likelihood's bound.

    Args:
        bound: the estimator. ``DenoisingElbo(steps=1)`` costs two evaluations of the network for each image.
    """

    def __init__(self, bound: ElboEstimator) -> None:
        super().__init__()
        self.bound = bound

    def forward(
        self,
        model: DiffusionModel,
        x0: Tensor,
        generators: Generators = None,
        *,
        share: BatchShare | None = None,
        **cond: Any,
    ) -> Tensor:
        """-ELBO / (C H W), ``[B]``. The estimator picks its steps for each image by itself, whatever the share."""
        return -self.bound(model, x0, generators, **cond).total / x0[0].numel()
