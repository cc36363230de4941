"""Independent Gaussian pixels in continuous time, for which the bound of infinitely many steps is elementary."""

import math

import torch
from torch import Tensor, nn

from ddpm_lightning.process import (
    DiffusionModel,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    GammaConditioning,
    PlainGaussian,
)
from ddpm_lightning.schedules import Schedule

__all__ = ["DIMS", "ENDS", "MEAN", "VAR", "OptimalFromGamma", "continuous_terms", "data", "model_of"]

MEAN, VAR, DIMS = 0.3, 0.25, 16
ENDS = (-6.0, 4.0)


class OptimalFromGamma(nn.Module):
    """E[eps | x_t] for independent N(MEAN, VAR) pixels, told gamma; ``gain`` makes it a worse one on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, gamma: Tensor) -> Tensor:
        abar = torch.sigmoid(-gamma.double()).reshape(-1, 1, 1, 1)
        x0 = MEAN + abar.sqrt() * VAR / (abar * VAR + 1 - abar) * (x - abar.sqrt() * MEAN)
        return self.gain * (x - abar.sqrt() * x0) / (1 - abar).sqrt()


def model_of(schedule: Schedule, variance: str = "beta") -> DiffusionModel:
    reverse = {"beta": FixedLargeVariance, "posterior": FixedSmallVariance}[variance]()
    conditioning = GammaConditioning(scale=1.0)
    return DiffusionModel(
        OptimalFromGamma(), schedule, EpsParameterization(), conditioning, reverse, PlainGaussian(256), clip_x0=False
    )


def data(count: int, generator: torch.Generator) -> Tensor:
    return MEAN + VAR**0.5 * torch.randn(count, 1, 4, 4, dtype=torch.float64, generator=generator)


def continuous_terms(first: float, last: float) -> dict[str, float]:
    """The exact limit: with s = VAR exp(-gamma), E |eps - eps-hat|^2 = s / (1 + s), so the integral is elementary."""
    sigma2 = 1 / (1 + math.exp(-first))
    error = VAR / (1 + VAR * math.exp(-first))
    reconstruction = -0.5 * (math.log(2 * math.pi * sigma2) + error / sigma2)
    abar, noise = 1 / (1 + math.exp(last)), 1 / (1 + math.exp(-last))
    prior = 0.5 * (noise + abar * (MEAN**2 + VAR) - 1 - math.log(noise))
    diffusion = 0.5 * math.log((1 + VAR * math.exp(-first)) / (1 + VAR * math.exp(-last)))
    elbo = reconstruction - prior - diffusion
    return {"reconstruction": reconstruction, "prior_matching": prior, "diffusion": diffusion, "elbo": elbo}
