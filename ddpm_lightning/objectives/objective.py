from typing import Any

from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel, GenerativeModel

__all__ = ["Objective"]


class Objective(nn.Module):
    """A loss for each image, to be averaged and minimised. Its own state is in buffers, so checkpoints hold it."""

    is_bound = False
    """True where the loss is minus the bound, so that a schedule can be learned by it."""
    trains_variance = False
    """True where the loss depends on the variance of the reverse steps, so that it can be learned by it."""

    def __init__(self) -> None:
        super().__init__()

    def check(self, model: GenerativeModel) -> None:
        """Raise InputError for a model that is no diffusion model; for a learned schedule or encoder under a loss that
        is no bound, which would only make its task easy; and for a learned variance under a loss that does not depend
        on it."""
        if not isinstance(model, DiffusionModel):
            raise InputError(f"{type(self).__name__} trains diffusion models only: use NegativeElbo")
        variance = model.reverse_process.variance
        if variance.network_outputs > 1 and not self.trains_variance:
            raise InputError(
                f"{type(self).__name__} does not depend on the reverse variance, so {type(variance).__name__} would "
                "not be learned: use HybridObjective or NegativeElbo, or a fixed variance"
            )
        learned = model.schedule if model.schedule.is_learned else None if model.encoder.is_identity else model.encoder
        if not self.is_bound and learned is not None:
            raise InputError(
                f"{type(learned).__name__} is learned through the bound, and {type(self).__name__} is none: use "
                "ContinuousNegativeElbo or NegativeElbo"
            )

    def forward(self, model: Any, x0: Tensor, generators: Generators = None, **cond: Any) -> Tensor:
        """Loss of each image, ``[B]``. In training mode a time sampler learns from it."""
        raise NotImplementedError
