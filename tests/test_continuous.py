"""Continuous time: schedules of any T, the limit of infinitely many steps, and the bound as an objective."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from oracles import ScalarGaussianWorld
from torch import Tensor, nn
from worlds_continuous import DIMS, ENDS, MEAN, VAR, continuous_terms, data, model_of

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousElbo,
    ContinuousNegativeElbo,
    DenoisingElbo,
    ElboEstimator,
    NegativeElbo,
    NoiseMSE,
    StratifiedTimes,
    TrajectoryElbo,
    UniformTimes,
)
from ddpm_lightning.process import (
    CategoricalDecoder,
    DiffusionModel,
    EpsParameterization,
    FixedSmallVariance,
    GammaConditioning,
    Parameterization,
    VParameterization,
    X0Parameterization,
)
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler
from ddpm_lightning.schedules import (
    CosineChain,
    CosineGamma,
    LearnedGamma,
    LinearChain,
    LinearGamma,
    Schedule,
    VarianceExploding,
)


def world_of(gammas: list[float], variance: str) -> ScalarGaussianWorld:
    """The exact world of a chain given by gamma of its states."""
    abar = [1.0] + [1 / (1 + math.exp(gamma)) for gamma in gammas]
    betas = [1 - new / old for old, new in itertools.pairwise(abar)]
    return ScalarGaussianWorld(MEAN, VAR, betas, variance)


def linear_gammas(T: int) -> list[float]:
    return [ENDS[0] + (ENDS[1] - ENDS[0]) * i / (T - 1) for i in range(T)]


def bent_schedule(first: float, last: float, T: int = 9) -> LearnedGamma:
    """A learned schedule far from a straight line."""
    schedule = LearnedGamma(first, last, T=T, units=4)
    with torch.no_grad():
        schedule.raw_height.copy_(torch.tensor([1.5, -1.0, -4.0, 0.3]))
        schedule.centre.copy_(torch.tensor([0.1, 0.3, 0.6, 0.9]))
    return schedule


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
    with pytest.raises(InputError, match="T = 1 must be 2 or more"):
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
    bent = bent_schedule(first, last, T=50)
    for schedule in (chain, LinearGamma(first, last, T=50), CosineGamma(first, last, T=50), bent):
        generator = torch.Generator().manual_seed(3)
        values = ContinuousElbo(8)(model_of(schedule), data(6000, generator), generator).named()
        assert_terms(values, continuous_terms(first, last))


def test_bound_approaches_the_continuous_one_in_first_order() -> None:
    limit = continuous_terms(*ENDS)["elbo"]
    gaps = [limit - world_of(linear_gammas(T + 1), "beta").terms()["denoising_form"]["elbo"] for T in (200, 400, 800)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(gaps)]
    assert all(gap > 0 for gap in gaps) and all(0.95 < order < 1.05 for order in orders), orders


@pytest.mark.parametrize(
    "schedule",
    [
        LinearGamma(*ENDS),
        LinearChain(20, 0.01, 0.3),
        CosineChain(30),
        CosineGamma(*ENDS),
        bent_schedule(*ENDS),
        VarianceExploding(CosineGamma(*ENDS)),
    ],
)
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


@pytest.mark.parametrize("make", [CosineGamma, bent_schedule])
def test_ends_and_monotony(make: Callable[..., Schedule]) -> None:
    t = torch.linspace(0, 1, 301, dtype=torch.float64)
    gamma = make(*ENDS, T=7).gamma(t).detach()
    assert float(gamma[0]) == pytest.approx(ENDS[0], abs=1e-6) and float(gamma[-1]) == pytest.approx(ENDS[1], abs=1e-6)
    assert bool((gamma.diff() > 0).all())


def test_cosine_gamma_is_the_cosine() -> None:
    """alpha = cos(pi t'/2) with t' linear in t: the chain of Nichol & Dhariwal without its offset."""
    schedule = CosineGamma(*ENDS)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    angles = torch.acos(schedule.alpha(t))
    torch.testing.assert_close(angles.diff(), angles.diff().mean().expand(10), rtol=1e-9, atol=0)


# --- variance exploding


@pytest.mark.parametrize("form", [DenoisingElbo(), ConsistencyElbo(), TrajectoryElbo(), ContinuousElbo(5)])
@pytest.mark.parametrize("parameterization", [EpsParameterization(), X0Parameterization(), VParameterization()])
def test_variance_exploding_is_the_same_process_in_other_units(
    form: ElboEstimator, parameterization: Parameterization
) -> None:
    """One network and one noise give each term the same value, to rounding, with the posterior variance."""

    class Curved(nn.Module):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return torch.tanh(x * (1 + c.reshape(-1, 1, 1, 1))) + 0.1 * x.roll(1, -1)

    def values(schedule: Schedule) -> dict[str, Tensor]:
        model = DiffusionModel(
            Curved(),
            schedule,
            parameterization,
            GammaConditioning(),
            FixedSmallVariance(),
            CategoricalDecoder(256),
        )
        x0 = (torch.arange(48, dtype=torch.float64).reshape(3, 1, 4, 4) * 5) * 2 / 255 - 1
        return form(model, x0, torch.Generator().manual_seed(1)).named()

    preserving, exploding = values(CosineGamma(*ENDS, T=7)), values(VarianceExploding(CosineGamma(*ENDS, T=7)))
    for name, value in preserving.items():
        torch.testing.assert_close(exploding[name], value, rtol=1e-8, atol=1e-8, msg=name)


def test_variance_exploding_by_its_definition() -> None:
    schedule = VarianceExploding(LinearGamma(*ENDS, T=5))
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert schedule.alpha(t).tolist() == [1, 1, 1]
    sigma2 = torch.exp(torch.tensor([-6.0, -3.5, 4.0], dtype=torch.float64))
    torch.testing.assert_close(schedule.sigma(t).square(), sigma2, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.log_step_var(t[:-1], t[1:]).exp(), sigma2.diff(), rtol=1e-9, atol=0)
    model = model_of(schedule)
    prior = model.prior(torch.zeros(2, 1, 4, 4))
    assert prior.log_var.exp().item() == pytest.approx(1 + math.exp(4.0))


@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler()])
def test_variance_exploding_samples_have_the_datas_moments(sampler: AncestralSampler | DDIMSampler) -> None:
    model = model_of(VarianceExploding(LinearGamma(-9.0, 7.0, T=300)))
    generator = torch.Generator().manual_seed(7)
    x_T = model.prior(torch.zeros(1500, 1, 4, 4, dtype=torch.float64)).sample(generator)
    images = sampler(model, x_T, generators=generator).detach().flatten()
    assert float(images.mean()) == pytest.approx(MEAN, abs=4 * (VAR / len(images)) ** 0.5 + 0.005)
    assert float(images.var()) == pytest.approx(VAR, rel=4 * (2 / len(images)) ** 0.5 + 0.02)


# --- the learned schedule


def second_moment(schedule: Schedule, points: int = 4001) -> Tensor:
    """integral over t of (gamma'(t) f(gamma(t)))^2 with f = s / (1 + s), by the trapezoidal rule."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    s = VAR * torch.exp(-schedule.gamma(t))
    return torch.trapezoid((schedule.gamma_slope(t) * s / (1 + s)).square(), t)


def test_slope_ratio_carries_the_gradient_of_the_second_moment() -> None:
    """Against autograd through the whole integral, in which gamma(t) moves too."""
    schedule = bent_schedule(*ENDS)
    shape = [schedule.raw_height, schedule.raw_rate, schedule.centre]
    exact = torch.autograd.grad(second_moment(schedule), shape)
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    with torch.no_grad():
        s = VAR * torch.exp(-schedule.gamma(t))
        square = (schedule.gamma_slope(t) * s / (1 + s)).square()
    assert torch.equal(schedule.slope_ratio(t), torch.ones_like(t))
    ours = torch.autograd.grad(torch.trapezoid(square * schedule.slope_ratio(t), t), shape)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)


def test_held_interior_stops_its_gradient_only() -> None:
    schedule = bent_schedule(*ENDS)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    with schedule.held_interior():
        loss = schedule.gamma(t).sum() + schedule.gamma_slope(t).sum()
    loss.backward()
    assert schedule.first.grad is not None and schedule.log_span.grad is not None
    assert schedule.raw_height.grad is None and schedule.centre.grad is None
    schedule.gamma(t).sum().backward()
    assert schedule.raw_height.grad is not None
    assert VarianceExploding(schedule).slope_ratio(t) is not None and LinearGamma().slope_ratio(t) is None


def test_continuous_objective_is_the_bound_and_its_end_gradients_are_the_bounds() -> None:
    """Exact world: d(-ELBO)/d(ends) from finite differences of the closed form, at each end, within 4 se."""
    schedule = LearnedGamma(*ENDS, T=9)
    model = model_of(schedule)
    objective = ContinuousNegativeElbo(StratifiedTimes())
    generator = torch.Generator().manual_seed(8)
    losses, first, span = [], [], []
    for _ in range(60):
        loss = objective(model, data(256, generator), generator).mean()
        grads = torch.autograd.grad(loss, [schedule.first, schedule.log_span])
        losses.append(loss.detach())
        first.append(grads[0])
        span.append(grads[1])
    h, width = 1e-5, ENDS[1] - ENDS[0]

    def exact(a: float, b: float) -> float:
        return -continuous_terms(a, b)["elbo"]

    # first moves both ends, log_span the last one by the width
    d_first = (exact(ENDS[0] + h, ENDS[1] + h) - exact(ENDS[0] - h, ENDS[1] - h)) / (2 * h)
    d_span = width * (exact(ENDS[0], ENDS[1] + h) - exact(ENDS[0], ENDS[1] - h)) / (2 * h)
    for values, expected in ((losses, exact(*ENDS)), (first, d_first), (span, d_span)):
        stacked = torch.stack(values).double()
        error = float(stacked.std()) / len(stacked) ** 0.5
        assert abs(float(stacked.mean()) - expected) < 4 * error + 1e-9, (float(stacked.mean()), expected, error)
        assert error < 0.1 * abs(expected) + 0.02


def test_learned_schedule_lowers_the_variance_of_the_estimator() -> None:
    """The optimum has gamma' f constant; the ends are held, the shape alone is trained."""
    schedule = LearnedGamma(*ENDS, T=9, units=16)
    model = model_of(schedule)
    schedule.first.requires_grad_(False)
    schedule.log_span.requires_grad_(False)
    objective = ContinuousNegativeElbo(StratifiedTimes())
    generator = torch.Generator().manual_seed(9)
    mean = 2 * continuous_terms(*ENDS)["diffusion"]  # the integral of f over gamma
    before = float(second_moment(schedule)) - mean**2
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        objective(model, data(64, generator), generator).mean().backward()
        optimizer.step()
    after = float(second_moment(schedule)) - mean**2
    assert after < 0.2 * before, (before, after)
    bound = ContinuousElbo(8)(model, data(6000, generator), generator).named()
    assert_terms(bound, continuous_terms(*ENDS))


def test_learned_schedule_learns_through_the_discrete_bound() -> None:
    """Few steps, posterior variance: the shape that training finds has a better exact bound than both fixed ones."""

    def exact(schedule: Schedule) -> float:
        gammas = schedule.gamma(schedule.grid()[1:]).tolist()
        return float(world_of(gammas, "posterior").terms()["denoising_form"]["elbo"])

    schedule = LearnedGamma(*ENDS, T=5, units=8)
    model = model_of(schedule, "posterior")
    objective = NegativeElbo(DenoisingElbo())
    generator = torch.Generator().manual_seed(10)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.02)
    start = exact(schedule)
    for _ in range(40):
        optimizer.zero_grad()
        objective(model, data(64, generator), generator).mean().backward()
        optimizer.step()
    fixed = max(exact(LinearGamma(*ENDS, T=5)), exact(CosineGamma(*ENDS, T=5)))
    assert exact(schedule) > max(fixed, start) + 0.01
    assert bool((schedule.gamma(schedule.grid()).diff() > 0).all())


def test_a_schedule_that_does_not_lose_signal_is_refused() -> None:
    class Rising(LinearGamma):
        def state_gamma(self, t: Tensor) -> Tensor:
            return -super().state_gamma(t)

    with pytest.raises(InputError, match="Rising does not increase"):
        model_of(Rising(*ENDS))
