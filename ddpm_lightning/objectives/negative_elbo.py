from typing import Any

from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives.elbo import ContinuousElbo, ElboEstimator, diffusion_cost
from ddpm_lightning.objectives.objective import Objective
from ddpm_lightning.objectives.times import TimeSampler
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel

__all__ = ["ContinuousNegativeElbo", "NegativeElbo"]


class NegativeElbo(Objective):
    """-ELBO in nats a dimension, by any estimator of the bound.

    Args:
        bound: the estimator. ``DenoisingElbo(steps=1)`` costs two evaluations of the network for each image.
    """

    is_bound = True

    def __init__(self, bound: ElboEstimator) -> None:
        super().__init__()
        self.bound = bound
        self.trains_variance = not isinstance(bound, ContinuousElbo)

    def forward(self, model: DiffusionModel, x0: Tensor, generators: Generators = None, **cond: Any) -> Tensor:
        return -self.bound(model, x0, generators, **cond).total / x0[0].numel()


class ContinuousNegativeElbo(Objective):
    """-ELBO of the limit T -> infinity in nats a dimension, at one time for each image; the way to train a learned
    schedule in continuous time (Kingma et al. 2021, arXiv 2107.00630, section 5 and appendix I.2).

    The bound trains the network and the ends of gamma. It does not depend on the shape of gamma between the ends. The
    shape minimises the second moment of the diffusion term's estimator, that is its variance. A term of value 0 carries
    that gradient, so the value of the loss is -ELBO for every schedule. Predicted x0 is not clipped.

    The cost is two evaluations of the network for each image, with ``CategoricalDecoder`` one.

    Args:
        times: draws the times between the first state and the last.
    """

    is_bound = True

    def __init__(self, times: TimeSampler) -> None:
        super().__init__()
        self.times = times

    def check(self, model: DiffusionModel) -> None:
        """As in the base class; a schedule without ``gamma_slope`` is refused too."""
        super().check(model)
        schedule = model.schedule
        try:
            schedule.gamma_slope(model.grid[-1])
        except NotImplementedError:
            raise InputError(
                f"ContinuousNegativeElbo needs d gamma/dt and {type(schedule).__name__} defines none: give it "
                "gamma_slope, or use NegativeElbo"
            ) from None

    def forward(self, model: DiffusionModel, x0: Tensor, generators: Generators = None, **cond: Any) -> Tensor:
        process, schedule, dims = model.forward_process, model.schedule, x0[0].numel()
        first = model.grid_on(x0.device)[1]
        draw = self.times(x0, generators)
        t = first + (1 - first) * draw.position
        with schedule.held_interior():
            diffusion = (1 - first) * diffusion_cost(model, model.denoiser, x0, t, generators, **cond)
            x1 = process.marginal(x0, first).sample(generators)
            reconstruction = model.log_likelihood(x0, x1, **cond)
            prior_matching = process.marginal(x0, model.grid_on(x0.device)[-1]).kl(model.prior(x0))
        if self.training:
            self.times.update(draw.position, diffusion.detach())
        weighted = draw.weight * diffusion
        loss = (weighted + prior_matching - reconstruction) / dims
        slope_ratio = schedule.slope_ratio(t)
        if slope_ratio is None:
            return loss
        return loss + (weighted.detach() / dims).square() * (slope_ratio - 1)
