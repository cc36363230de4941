"""Worlds whose probability-flow ODE is solved in closed form, for the solvers of it."""

import torch
from torch import Tensor, nn
from worlds_chain import Scales, exploding, preserving
from worlds_gaussian import CorrelatedGaussianWorld
from worlds_mixture import MixtureWorld

from ddpm_lightning.process import (
    DiffusionModel,
    EpsParameterization,
    FixedLargeVariance,
    GammaConditioning,
    PlainGaussian,
)
from ddpm_lightning.schedules import CosineGamma, LinearChain, LinearGamma, Schedule, VarianceExploding

MEAN = [0.3, -0.6, 0.8, 0.1]
COV = [[0.5, 0.3, -0.2, 0.1], [0.3, 0.6, -0.1, 0.2], [-0.2, -0.1, 0.4, 0.1], [0.1, 0.2, 0.1, 0.3]]
CORRELATED = CorrelatedGaussianWorld(MEAN, COV)
SCALAR = CorrelatedGaussianWorld([0.3], [[0.25]])
PIXELS = MixtureWorld([0.3, 0.5, 0.2], [-1.5, 0.2, 1.2], [0.2, 0.4, 0.3])
IMAGES = MixtureWorld([0.4, 0.6], [[-0.9, 0.8, 0.5, -0.7], [0.6, -0.9, 0.3, 0.9]], 0.4)

SCHEDULES: dict[str, tuple[Schedule, Scales]] = {
    "linear gamma": (LinearGamma(-6.0, 8.0), preserving),
    "cosine": (CosineGamma(-6.0, 8.0), preserving),
    "exploding": (VarianceExploding(LinearGamma(-6.0, 8.0)), exploding),
    "chain": (LinearChain(400, 1e-3, 0.03), preserving),
}


class Elementwise(nn.Module):
    """Each pixel by itself, with large outputs, so that clipping has work to do."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return 2 * torch.cos(3 * x) + c.reshape(-1, 1, 1, 1)


def elementwise_model() -> DiffusionModel:
    """A model whose arithmetic for an image is the same in any batch, to the last bit."""
    return DiffusionModel(
        network=Elementwise(),
        schedule=LinearGamma(-6.0, 8.0),
        parameterization=EpsParameterization(),
        conditioning=GammaConditioning(),
        variance=FixedLargeVariance(),
        decoder=PlainGaussian(levels=256),
    )


def start(model: DiffusionModel, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A draw from the prior, float64."""
    return model.prior(torch.zeros(shape, dtype=torch.float64)).sample(torch.Generator().manual_seed(seed))


def gaussian_flow(world: CorrelatedGaussianWorld, x_t: Tensor, now: Tensor, then: Tensor, scales: Scales) -> Tensor:
    """The probability-flow ODE from gamma ``now`` to ``then``: each principal component keeps its standard score."""
    (alpha_t, sigma2_t), (alpha_s, sigma2_s) = scales(now), scales(then)
    stretch = torch.sqrt((alpha_s**2 * world.values + sigma2_s) / (alpha_t**2 * world.values + sigma2_t))
    centred = x_t.reshape(-1, world.dims) - alpha_t * world.mean
    return (alpha_s * world.mean + (centred @ world.vectors * stretch) @ world.vectors.T).reshape(x_t.shape)


def mixture_flow(world: MixtureWorld, x_t: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """The same in one dimension, where the flow keeps quantiles."""
    alpha, sigma2 = preserving(then)
    means, stds = alpha * world.means, torch.sqrt(alpha**2 * world.var + sigma2)
    noisy = MixtureWorld(world.weights.tolist(), means.flatten().tolist(), stds.tolist())
    return noisy.quantile(world.cdf(x_t, *preserving(now)))
