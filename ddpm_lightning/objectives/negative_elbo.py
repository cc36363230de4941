from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.objectives.elbo import ConsistencyElbo, ContinuousElbo, ElboEstimator, diffusion_cost
from ddpm_lightning.objectives.objective import Objective
from ddpm_lightning.objectives.times import TimeSampler
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel, GenerativeModel

__all__ = ["ContinuousNegativeElbo", "NegativeElbo"]


class NegativeElbo(Objective):
    r"""-ELBO in nats a dimension, by any estimator of the bound.

    Two options help to train a hierarchy of learned encoders, whose upper levels may otherwise fall silent early: they
    carry nothing, at no cost. Both change the training loss only, never a bound that is reported.

    - Warm-up (Bowman et al. 2015, arXiv 1511.06349): the costs are multiplied by a weight that rises from 0 to 1.
    - Free nats (Kingma et al. 2016, arXiv 1606.04934): a level whose cost, averaged over the batch, is below
      ``free_nats`` is not pressed further. A level's cost is its summand in the consistency form.

    Args:
        bound: the estimator. ``DenoisingElbo(steps=1)`` costs two evaluations of the network for each image.
        warmup: number of batches over which the weight of the costs rises; 0 for none.
        free_nats: nats an image that each level may cost freely; 0 for none. Needs ConsistencyElbo over all steps.
    """

    is_bound = True
    batches: Tensor

    def __init__(self, bound: ElboEstimator, warmup: int = 0, free_nats: float = 0.0) -> None:
        super().__init__()
        at_least(0, warmup=warmup)
        if not 0 <= free_nats < float("inf"):
            raise InputError(f"free_nats = {free_nats:g} must be 0 or positive, and finite")
        if free_nats and not (isinstance(bound, ConsistencyElbo) and bound.steps is None):
            raise InputError(f"free_nats = {free_nats:g} needs the cost of each level: use ConsistencyElbo, steps null")
        self.bound, self.warmup, self.free_nats = bound, warmup, free_nats
        self.trains_variance = not isinstance(bound, ContinuousElbo)
        if warmup:
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def check(self, model: GenerativeModel) -> None:
        self.bound.check(model)
        if isinstance(model, DiffusionModel):
            super().check(model)

    def forward(self, model: GenerativeModel, x0: Tensor, generators: Generators = None, **cond: Any) -> Tensor:
        terms = self.bound(model, x0, generators, **cond)
        if not (self.warmup or self.free_nats):
            return -terms.total / x0[0].numel()
        cost = terms.reconstruction - terms.total
        if self.free_nats:
            levels = torch.cat([terms.step_costs, terms.costs["prior_matching"][:, None]], dim=1)
            cost = torch.where(levels.mean(0) > self.free_nats, levels, self.free_nats).sum(1)
        if self.warmup:
            cost = cost * (self.batches / self.warmup).clamp(max=1)
            self.batches += self.training
        return (cost - terms.reconstruction) / x0[0].numel()


class ContinuousNegativeElbo(Objective):
    """-ELBO of the limit T -> infinity in nats a dimension, at one time for each image; the way to train a learned
    schedule in continuous time (Kingma et al. 2021, arXiv 2107.00630, section 5 and appendix I.2).

    The bound trains the network, the encoder and the ends of gamma. It does not depend on the shape of gamma between
    the ends. The shape minimises the second moment of the diffusion term's estimator, that is its variance. A term of
    value 0 carries that gradient, so the value of the loss is -ELBO for every schedule. The exception is
    ``PixelwiseGamma``, whose shape the bound trains too. Predicted x0 is not clipped.

    The cost is two evaluations of the network for each image, with ``CategoricalDecoder`` one.

    Args:
        times: draws the times between the first state and the last.
    """

    is_bound = True

    def __init__(self, times: TimeSampler) -> None:
        super().__init__()
        self.times = times

    def check(self, model: GenerativeModel) -> None:
        """As in the base class; a schedule without ``gamma_slope`` is refused too."""
        super().check(model)
        assert isinstance(model, DiffusionModel)
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
