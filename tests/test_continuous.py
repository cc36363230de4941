"""Continuous time: schedules of any T, the limit of infinitely many steps, and the bound as an objective."""

import itertools
import math

import pytest
import torch
from oracles import ScalarGaussianWorld
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousElbo,
    DenoisingElbo,
    ElboEstimator,
    NegativeElbo,
    NoiseMSE,
    TrajectoryElbo,
    UniformTimes,
)
from ddpm_lightning.process import (
    DiffusionModel,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    GammaConditioning,
    PlainGaussian,
)
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler
from ddpm_lightning.schedules import CosineChain, LinearChain, LinearGamma, Schedule

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


def world_of(gammas: list[float], variance: str) -> ScalarGaussianWorld:
    """The exact world of a chain given by gamma of its states."""
    abar = [1.0] + [1 / (1 + math.exp(gamma)) for gamma in gammas]
    betas = [1 - new / old for old, new in itertools.pairwise(abar)]
    return ScalarGaussianWorld(MEAN, VAR, betas, variance)


def linear_gammas(T: int) -> list[float]:
    return [ENDS[0] + (ENDS[1] - ENDS[0]) * i / (T - 1) for i in range(T)]


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


def assert_terms(values: dict[str, Tensor], expected: dict[str, float]) -> None:
    for name in set(values) & set(expected):
        value = values[name].detach() / DIMS
        error = float(value.std()) / len(value) ** 0.5
        assert abs(float(value.mean()) - expected[name]) < 4 * error + 1e-9, name


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("T", [2, 12, 60])
@pytest.mark.parametrize("form", [DenoisingElbo, ConsistencyElbo, TrajectoryElbo])
def test_forms_are_exact_on_linear_gamma(form: type[ElboEstimator], T: int, variance: str) -> None:
    generator = torch.Generator().manual_seed(T)
    values = form()(model_of(LinearGamma(*ENDS, T=T), variance), data(3000, generator), generator).named()
    exact = world_of(linear_gammas(T), variance).terms()
    of_form = exact["consistency_form" if form is ConsistencyElbo else "denoising_form"]
    assert_terms(values, {**of_form, "reconstruction": exact["reconstruction"]})


@pytest.mark.parametrize("form", [DenoisingElbo, ConsistencyElbo, TrajectoryElbo])
@pytest.mark.parametrize(("schedule", "T"), [(LinearGamma(*ENDS, T=7), 25), (LinearChain(8, 0.02, 0.5), 24)])
def test_a_model_is_evaluated_with_another_T(form: type[ElboEstimator], schedule: Schedule, T: int) -> None:
    generator = torch.Generator().manual_seed(1)
    values = form(T=T)(model_of(schedule), data(3000, generator), generator).named()
    if isinstance(schedule, LinearGamma):
        gammas = linear_gammas(T)
    else:
        # three states for one: each third of a step keeps a third of log(1 - beta)
        betas = [0.02 + 0.48 * i / 7 for i in range(8)]
        logs = [math.log(1 - beta) / 3 for beta in betas for _ in range(3)]
        gammas = [math.log(math.expm1(-sum(logs[: i + 1]))) for i in range(T)]
    exact = world_of(gammas, "beta").terms()
    of_form = exact["consistency_form" if form is ConsistencyElbo else "denoising_form"]
    assert_terms(values, {**of_form, "reconstruction": exact["reconstruction"]})


def test_a_model_with_other_steps_shares_its_weights_and_leaves_it_alone() -> None:
    model = model_of(LinearGamma(*ENDS, T=5))
    other = model.with_steps(9)
    assert (model.T, other.T) == (5, 9) and other.network is model.network
    with pytest.raises(InputError, match="T = 1 is too few"):
        model.with_steps(1)
    with pytest.raises(InputError, match="T = 0"):
        model_of(LinearChain(4, 0.1, 0.5)).with_steps(0)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_continuous_bound_is_exact(steps: int, variance: str) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        terms = ContinuousElbo(steps)(model_of(LinearGamma(*ENDS, T=9), variance), data(6000, generator), generator)
    expected = continuous_terms(*ENDS)
    if variance == "posterior":  # the decoder's variance is then the chain's
        del expected["reconstruction"], expected["elbo"]
    assert_terms(terms.named(), expected)
    assert torch.allclose(terms.step_costs.sum(1) / steps, terms.costs["diffusion"])


def test_continuous_bound_does_not_depend_on_the_interior_of_the_schedule() -> None:
    """Only gamma of the first and of the last state counts: a straight line and a chain's curve give one value."""
    chain = LinearChain(50, 0.003, 0.2)
    first, last = (float(chain.gamma(t)) for t in chain.grid()[[1, -1]])
    for schedule in (chain, LinearGamma(first, last, T=50)):
        generator = torch.Generator().manual_seed(3)
        values = ContinuousElbo(8)(model_of(schedule), data(6000, generator), generator).named()
        assert_terms(values, continuous_terms(first, last))


def test_bound_approaches_the_continuous_one_in_first_order() -> None:
    limit = continuous_terms(*ENDS)["elbo"]
    gaps = [limit - world_of(linear_gammas(T + 1), "beta").terms()["denoising_form"]["elbo"] for T in (200, 400, 800)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(gaps)]
    assert all(gap > 0 for gap in gaps) and all(0.95 < order < 1.05 for order in orders), orders


@pytest.mark.parametrize("schedule", [LinearGamma(*ENDS), LinearChain(20, 0.01, 0.3), CosineChain(30)])
def test_slope_is_the_derivative(schedule: Schedule) -> None:
    t = torch.tensor([0.071, 0.333, 0.52, 0.917], dtype=torch.float64)
    h = 1e-6
    difference = (schedule.gamma(t + h) - schedule.gamma(t - h)) / (2 * h)
    with torch.inference_mode():
        assert torch.allclose(schedule.gamma_slope(t), difference, rtol=1e-6)


def test_objective_is_the_negative_bound_and_finds_the_best_denoiser() -> None:
    model = model_of(LinearGamma(*ENDS, T=10))
    objective = NegativeElbo(DenoisingElbo(steps=2))
    generator = torch.Generator().manual_seed(4)
    x0 = data(64, generator)
    state = generator.get_state()
    loss = objective(model, x0, generator)
    generator.set_state(state)
    assert torch.equal(loss, -DenoisingElbo(steps=2)(model, x0, generator).total / DIMS)
    with torch.no_grad():
        model.network.gain.fill_(0.7)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        objective(model, data(64, generator), generator).mean().backward()
        optimizer.step()
    assert float(model.network.gain) == pytest.approx(1.0, abs=0.05)


def test_noise_mse_meets_every_state_of_a_continuous_schedule() -> None:
    model = model_of(LinearGamma(*ENDS, T=4))
    seen: set[float] = set()

    class Recorder(nn.Module):
        def forward(self, x: Tensor, gamma: Tensor) -> Tensor:
            seen.update(round(float(value), 6) for value in gamma)
            return x

    model.denoiser.network = Recorder()
    NoiseMSE(UniformTimes())(model, data(200, torch.Generator().manual_seed(5)), torch.Generator().manual_seed(6))
    assert seen == {round(gamma, 6) for gamma in linear_gammas(4)}


@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler()])
def test_samples_have_the_datas_moments(sampler: AncestralSampler | DDIMSampler) -> None:
    model = model_of(LinearGamma(-9.0, 7.0, T=300))
    generator = torch.Generator().manual_seed(7)
    x_T = torch.randn(1500, 1, 4, 4, dtype=torch.float64, generator=generator)
    images = sampler(model, x_T, generators=generator).detach().flatten()
    assert float(images.mean()) == pytest.approx(MEAN, abs=4 * (VAR / len(images)) ** 0.5 + 0.005)
    assert float(images.var()) == pytest.approx(VAR, rel=4 * (2 / len(images)) ** 0.5 + 0.02)


@pytest.mark.parametrize("ends", [(4.0, -6.0), (1.0, 1.0)])
def test_gamma_must_increase(ends: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="signal-to-noise ratio falls"):
        LinearGamma(*ends)


def test_data_are_clean_and_the_first_state_is_not() -> None:
    schedule = LinearGamma(*ENDS, T=6)
    grid = schedule.grid()
    assert len(grid) == 7 and grid[0] == -1 and grid[1] == 0 and grid[-1] == 1
    assert float(schedule.sigma(grid[0])) == 0 and float(schedule.alpha(grid[0])) == 1
    assert float(schedule.gamma(grid[1])) == ENDS[0] and len(schedule.grid(20)) == 21
