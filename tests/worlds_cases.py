"""Worlds, chains and models that the tests of samplers, guidance and posteriors share."""

import torch
from torch import Tensor, nn
from worlds_chain import World, gammas_of_betas, preserving
from worlds_gaussian import CorrelatedGaussianWorld
from worlds_mixture import MixtureWorld

from ddpm_lightning.process import (
    DiffusionModel,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    PlainGaussian,
    ReverseVariance,
    TimeConditioning,
)
from ddpm_lightning.samplers import Sampler
from ddpm_lightning.schedules import BetaChain, LinearGamma, Schedule

__all__ = [
    "BETAS",
    "COARSE",
    "CORRELATED",
    "EYE",
    "GAMMAS",
    "IMAGES",
    "PIXELS",
    "SCHEDULE",
    "TIMES",
    "VARIANCES",
    "exact",
    "network_model",
    "noise",
    "states_of",
]

MEAN = [0.3, -0.6, 0.8, 0.1]
COV = [[0.5, 0.3, -0.2, 0.1], [0.3, 0.6, -0.1, 0.2], [-0.2, -0.1, 0.4, 0.1], [0.1, 0.2, 0.1, 0.3]]
CORRELATED = CorrelatedGaussianWorld(MEAN, COV)
PIXELS = MixtureWorld([0.3, 0.5, 0.2], [-1.5, 0.2, 1.2], [0.2, 0.4, 0.3])
IMAGES = MixtureWorld([0.4, 0.6], [[-0.9, 0.8, 0.5, -0.7], [0.6, -0.9, 0.3, 0.9]], 0.4)

BETAS = [0.02, 0.1, 0.05, 0.3, 0.2, 0.6, 0.5, 0.4]
COARSE: dict[str, tuple[Schedule, list[float]]] = {
    "betas": (BetaChain(BETAS), gammas_of_betas(BETAS)),
    "linear gamma": (LinearGamma(-5.0, 4.0, T=8), [-5 + 9 * i / 7 for i in range(8)]),
}
VARIANCES: dict[str, ReverseVariance] = {"beta": FixedLargeVariance(), "posterior": FixedSmallVariance()}

EYE = torch.eye(4, dtype=torch.float64)
SCHEDULE, GAMMAS = COARSE["linear gamma"]
TIMES = [0.0, 0.3, 0.6, 1.0]


def noise(count: int, seed: int = 1, size: int = 2) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(world: World, x_t: Tensor, t: float, schedule: Schedule = SCHEDULE) -> Tensor:
    """E[x_0 | x_t] in a world, of the shape of images."""
    scales = preserving(schedule.gamma(torch.tensor(t, dtype=torch.float64)))
    return world.x0_mean(x_t.reshape(-1, world.dims), *scales).reshape(x_t.shape)


def states_of(model: DiffusionModel, sampler: Sampler, count: int, **cond: Tensor) -> list[Tensor]:
    """Events of x_T, ..., x_1 and of the image, ``[N, 4]`` each."""
    states = [noise(count)]
    generator = torch.Generator().manual_seed(2)
    sampler(model, states[0], generators=generator, callback=lambda x, s: states.append(x), **cond)
    return [state.reshape(count, 4) for state in states]


class Network(nn.Module):
    """Parameters, pixels that do not mix, large outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self, x: Tensor, c: Tensor, *, label: Tensor | None = None) -> Tensor:
        shift = c if label is None else c + label
        return torch.sin(self.gain * x) + shift.reshape(-1, 1, 1, 1)


def network_model(clip_x0: bool = True) -> DiffusionModel:
    return DiffusionModel(
        Network(),
        SCHEDULE,
        EpsParameterization(),
        TimeConditioning(),
        FixedLargeVariance(),
        PlainGaussian(levels=256),
        clip_x0,
    )
