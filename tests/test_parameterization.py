"""Parameterisations: one canonical form, and the same bound whichever of them the network speaks."""

import pytest
import torch
from oracles import OptimalEps, ScalarGaussianWorld, linear_betas
from torch import Tensor, nn

from ddpm_lightning.objectives import ConsistencyElbo, DenoisingElbo, ElboEstimator, TrajectoryElbo
from ddpm_lightning.process import (
    DiffusionModel,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    Parameterization,
    PlainGaussian,
    ReverseVariance,
    ScoreParameterization,
    TimeConditioning,
    VParameterization,
    X0Parameterization,
)
from ddpm_lightning.samplers import AncestralSampler
from ddpm_lightning.schedules import LinearChain

ALL = [EpsParameterization(), X0Parameterization(), VParameterization(), ScoreParameterization()]
NAMES = [type(p).__name__ for p in ALL]
WORLD = {"mean": 0.3, "var": 0.25, "betas": linear_betas(10, 0.02, 0.5)}


class Speaks(nn.Module):
    """The optimal denoiser, saying what it knows in the terms of a parameterisation."""

    def __init__(self, parameterization: Parameterization, world: ScalarGaussianWorld) -> None:
        super().__init__()
        self.parameterization = parameterization
        self.eps = OptimalEps(world.mean, world.var, world.abar)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        abar = self.eps.table[(t * 10).round().long()].reshape(-1, 1, 1, 1)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        eps = self.eps(x, t)
        return self.parameterization.target((x - sigma * eps) / alpha, eps, alpha, sigma)


def model_of(
    parameterization: Parameterization, variance: ReverseVariance, world: ScalarGaussianWorld
) -> DiffusionModel:
    return DiffusionModel(
        Speaks(parameterization, world), LinearChain(10, 0.02, 0.5), parameterization, TimeConditioning(), variance,
        PlainGaussian(256), clip_x0=False,
    )  # fmt: skip


@pytest.mark.parametrize("parameterization", ALL, ids=NAMES)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.6, 0.8), (0.999, 0.0447), (0.02, 0.9998), (1.0, 3.0)])
def test_target_and_prediction_are_inverse(parameterization: Parameterization, alpha: float, sigma: float) -> None:
    x0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, s = (torch.full((3, 1, 1, 1), value, dtype=torch.float64) for value in (alpha, sigma))
    output = parameterization.target(x0, eps, a, s)
    prediction = parameterization.predict(output, a * x0 + s * eps, a, s)
    assert torch.allclose(prediction.x0, x0, atol=1e-10) and torch.allclose(prediction.eps, eps, atol=1e-10)


@pytest.mark.parametrize("parameterization", ALL, ids=NAMES)
def test_a_wrong_output_still_gives_a_consistent_pair(parameterization: Parameterization) -> None:
    x_t, output = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, s = (torch.full((3, 1, 1, 1), value, dtype=torch.float64) for value in (0.6, 0.8))
    prediction = parameterization.predict(output, x_t, a, s)
    assert torch.allclose(a * prediction.x0 + s * prediction.eps, x_t, atol=1e-12)


@pytest.mark.parametrize("name", ["beta", "posterior"])
@pytest.mark.parametrize("form", [DenoisingElbo(), ConsistencyElbo(), TrajectoryElbo()], ids=lambda form: form.name)
@pytest.mark.parametrize("parameterization", ALL, ids=NAMES)
def test_the_bound_is_exact_in_every_parameterisation(
    parameterization: Parameterization, form: ElboEstimator, name: str
) -> None:
    world = ScalarGaussianWorld(**WORLD, variance=name)
    model = model_of(parameterization, {"beta": FixedLargeVariance, "posterior": FixedSmallVariance}[name](), world)
    generator = torch.Generator().manual_seed(2)
    x0 = world.mean + world.var**0.5 * torch.randn(4000, 1, 4, 4, dtype=torch.float64, generator=generator)
    values = form(model, x0, generator).named()
    exact = world.terms()
    of_form = exact["consistency_form" if form.name == "consistency" else "denoising_form"]
    expected = {**of_form, "reconstruction": exact["reconstruction"]}
    for term in set(values) & set(expected):
        value = values[term] / 16
        error = float(value.std()) / len(value) ** 0.5
        assert abs(float(value.mean()) - expected[term]) < 4 * error + 1e-9, term


@pytest.mark.parametrize("parameterization", ALL[1:], ids=NAMES[1:])
def test_samples_do_not_depend_on_the_parameterisation(parameterization: Parameterization) -> None:
    world = ScalarGaussianWorld(**WORLD, variance="beta")
    x_T = torch.randn(5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    images = [
        AncestralSampler()(model_of(p, FixedLargeVariance(), world), x_T, generators=torch.Generator().manual_seed(4))
        for p in (ALL[0], parameterization)
    ]
    assert torch.allclose(*images, atol=1e-9)
