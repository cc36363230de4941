"""Reverse variances beyond the fixed ones, and the objective that learns one, against what is known exactly."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracles import (
    OptimalEps,
    ScalarGaussianWorld,
    assert_mean,
    assert_moments,
    draw_data,
    linear_betas,
    oracle_model,
    respaced,
    reverse_map,
)
from torch import Tensor, nn

from ddpm_lightning.distributions import DiagonalGaussian
from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    DenoisingElbo,
    ElboEstimator,
    HybridObjective,
    NegativeElbo,
    NoiseMSE,
    StratifiedTimes,
    TimeDraw,
    TimeSampler,
    TrajectoryElbo,
    UniformTimes,
)
from ddpm_lightning.process import (
    AnalyticVariance,
    Decoder,
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    LearnedRangeVariance,
    PlainGaussian,
    Prediction,
    ReverseVariance,
    TimeConditioning,
    eps_mse_table,
    spread_times,
)
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, Sampler
from ddpm_lightning.schedules import BetaChain, CosineChain, LinearChain, LinearGamma, Schedule, strided_grid

DIMS = 16
CHAINS = {3: linear_betas(3, 0.1, 0.6), 10: linear_betas(10, 0.02, 0.4)}
DATA = {"wide": (0.3, 0.25), "narrow": (-0.7, 0.02)}
KINDS: dict[str, tuple[str, float | None]] = {
    "optimal": ("optimal", None), "range 0.3": ("range", 0.3), "range 1.2": ("range", 1.2)
}  # fmt: skip


def world_of(T: int, data: str, kind: str = "optimal") -> ScalarGaussianWorld:
    return ScalarGaussianWorld(*DATA[data], CHAINS[T], *KINDS.get(kind, (kind, None)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned_model(
    network: nn.Module, schedule: Schedule, *, decoder: Decoder | None = None, clip_x0: bool = False
) -> DiffusionModel:
    return DiffusionModel(
        network, schedule, EpsParameterization(), TimeConditioning(), LearnedRangeVariance(),
        decoder or PlainGaussian(levels=256), clip_x0=clip_x0,
    )  # fmt: skip


class Zero(nn.Module):
    """eps is 0."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


def decoder_gaussian(model: DiffusionModel, x1: Tensor, t1: Tensor, t2: Tensor) -> DiagonalGaussian:
    """Of a chain whose first two times these are."""
    reverse = model.reverse_process
    return reverse.decoder_gaussian(reverse.denoiser(x1, t1), x1, t1, t2)


class Fixed(TimeSampler):
    """The same step for every image."""

    def __init__(self, step: int, T: int) -> None:
        super().__init__()
        self.position = (step - 0.5) / T

    def forward(self, like: Tensor, generators: object = None) -> TimeDraw:
        position = torch.full(like.shape[:1], self.position, dtype=torch.float64)
        return TimeDraw(position, torch.ones_like(position))


class Scaled(nn.Module):
    """eps = weight x and the variance's channels are ``fraction_output`` at every time, ``[C, H, W]`` each."""

    def __init__(self, shape: tuple[int, int, int] = (1, 4, 4), scale: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale + 0.1 * normal(*shape))
        self.fraction_output = nn.Parameter(0.3 * normal(*shape, seed=1))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([self.weight * x, self.fraction_output.expand_as(x)], 1)


# --- the analytic variance


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("T", CHAINS)
def test_the_analytic_variance_is_that_of_the_state_given_the_next(T: int, data: str) -> None:
    """The law of total variance against the moments of the joint Gaussian, on the chain and on a strided grid."""
    world = world_of(T, data)
    model, x = oracle_model(world), normal(2, 1, 2, 2)
    for indices in (list(range(T + 1)), [0, 1, T], [0, 2, T]):
        strided, times = respaced(world, indices), torch.tensor(indices, dtype=torch.float64) / T
        for t in range(2, strided.T + 1):
            step = model.reverse_process.transition(x, times[t - 1], times[t])
            assert step.log_var.dtype == torch.float64
            assert step.log_var.exp().item() == pytest.approx(strided.reverse_var(t), rel=1e-9)
        first = decoder_gaussian(model, x, times[1], times[min(2, strided.T)])
        assert first.log_var.exp().item() == pytest.approx(strided.reverse_var(1), rel=1e-9)


@pytest.mark.parametrize("schedule", [CosineChain(50), LinearChain(1000), LinearGamma(-8.0, 6.0, T=40)])
def test_one_table_serves_every_schedule_and_number_of_steps(schedule: Schedule) -> None:
    """eps_mse = var / (var + exp(gamma)) whatever the schedule: Var(x_s | x_t) to the error of the interpolation."""
    var = 0.25
    gammas = torch.linspace(-12, 20, 800, dtype=torch.float64)
    variance = AnalyticVariance(gammas.tolist(), (var / (var + gammas.exp())).tolist())
    model = DiffusionModel(
        Zero(), schedule, EpsParameterization(), TimeConditioning(), variance, PlainGaussian(levels=256)
    )
    for T in (schedule.T, 7):
        grid = model.with_steps(T).grid
        abar = schedule.alpha(grid).square()
        total = abar * var + 1 - abar
        exact = total[:-1] - abar[1:] / abar[:-1] * total[:-1].square() / total[1:]
        step = model.reverse_process.transition(torch.zeros(T - 1, 1, 1, 1), grid[1:-1], grid[2:])
        torch.testing.assert_close(step.log_var.flatten().exp(), exact[1:], rtol=1e-4, atol=0)
        first = decoder_gaussian(model, torch.zeros(1, 1, 1, 1), grid[1], grid[2])
        assert first.log_var.exp().item() == pytest.approx(float(exact[0]), rel=1e-4)


def test_interpolation_is_linear_in_the_logarithm_and_constant_beyond_the_ends() -> None:
    variance = AnalyticVariance([-2.0, 0.0, 3.0], [0.5, 0.1, 0.4])
    for gamma, expected in [
        (-9.0, 0.5), (-2.0, 0.5), (-1.0, math.sqrt(0.5 * 0.1)), (0.0, 0.1), (2.0, 0.1 ** (1 / 3) * 0.4 ** (2 / 3)),
        (3.0, 0.4), (30.0, 0.4),
    ]:  # fmt: skip
        assert variance.log_eps_mse(torch.tensor(gamma)).exp().item() == pytest.approx(expected, rel=1e-12)
    many = variance.log_eps_mse(torch.tensor([[-1.0, 3.0], [0.0, -5.0]]))
    assert many.shape == (2, 2) and many.dtype == torch.float64
    one = AnalyticVariance([1.0], [0.2]).log_eps_mse(torch.tensor([-5.0, 1.0, 1.5, 9.0]))
    torch.testing.assert_close(one.exp(), torch.full((4,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("gammas", "eps_mse", "word"),
    [
        ([0.0, 1.0], [0.5], "gammas has 2 entries and .*eps_mse has 1"),
        ([], [], "at least one"),
        ([1.0, 1.0], [0.5, 0.4], "gammas must be finite and increase"),
        ([1.0, 0.0], [0.5, 0.4], "gammas must be finite and increase"),
        ([0.0, math.nan], [0.5, 0.4], "gammas must be finite and increase"),
        ([-math.inf, 0.0], [0.5, 0.4], "gammas must be finite and increase"),
        ([0.0, 1.0], [0.5, 0.0], "eps_mse must be finite and above 0"),
        ([0.0, 1.0], [math.nan, 0.5], "eps_mse must be finite and above 0"),
    ],
)
def test_analytic_table_errors(gammas: list[float], eps_mse: list[float], word: str) -> None:
    with pytest.raises(InputError, match=word):
        AnalyticVariance(gammas, eps_mse)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("T", CHAINS)
def test_no_fixed_variance_has_a_higher_bound(T: int, data: str) -> None:
    """Exact values: the optimum beats both fixed variances and every constant fraction, and is below log p."""
    bounds = {
        kind: world_of(T, data, kind).terms()["denoising_form"]["elbo"] for kind in ("optimal", "beta", "posterior")
    }
    fractions = [
        ScalarGaussianWorld(*DATA[data], CHAINS[T], "range", v).terms()["denoising_form"]["elbo"]
        for v in (0.1, 0.5, 0.9)
    ]
    assert bounds["optimal"] > max(bounds["beta"], bounds["posterior"], *fractions) + 1e-3
    assert bounds["optimal"] <= world_of(T, data).log_p() + 1e-12


def test_the_measured_variance_is_optimal_for_a_wrong_denoiser() -> None:
    """For eps-hat = x / 2 the expected KL is smallest at the variance that its own error gives: any other is worse."""
    world = world_of(10, "wide", "beta")
    schedule, generator = BetaChain(world.betas), torch.Generator().manual_seed(0)

    class Half(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.5 * x

    def model_with(variance: ReverseVariance) -> DiffusionModel:
        return DiffusionModel(
            Half(), schedule, EpsParameterization(), TimeConditioning(), variance, PlainGaussian(levels=256), False
        )

    model = model_with(FixedLargeVariance())
    batches = [(draw_data(world, (500, 1, 4, 4), generator), {}) for _ in range(8)]
    gammas, eps_mse = eps_mse_table(model, batches, model.grid[1:], generator)
    for t in range(1, 11):
        # E (eps - x_t / 2)^2 by hand
        abar = world.abar[t]
        exact = (1 - math.sqrt(1 - abar) / 2) ** 2 + abar / 4 * (world.var + world.mean**2)
        assert eps_mse[t - 1] == pytest.approx(exact, rel=0.03)
    x0 = draw_data(world, (4000, 1, 4, 4), generator)
    bounds = []
    for factor in (0.9, 1.0, 1.1):
        variance = AnalyticVariance(gammas, [factor * value for value in eps_mse])
        bounds.append(DenoisingElbo()(model_with(variance), x0, torch.Generator().manual_seed(1)))
    assert bool((bounds[1].step_costs.mean(0) < bounds[0].step_costs.mean(0)).all())
    assert bool((bounds[1].step_costs.mean(0) < bounds[2].step_costs.mean(0)).all())
    assert bounds[1].reconstruction.mean() > max(bounds[0].reconstruction.mean(), bounds[2].reconstruction.mean())


# --- measuring the table


def test_eps_mse_table_is_exact_in_expectation() -> None:
    world = world_of(10, "wide")
    model, generator = oracle_model(world), torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for size in (700, 1300):
            yield draw_data(world, (size, 1, 4, 4), generator), {}

    times = model.grid[[1, 4, 10]]
    gammas, eps_mse = eps_mse_table(model, batches(), times, generator)
    assert gammas == model.schedule.gamma(times).tolist()
    for t, value in zip((1, 4, 10), eps_mse, strict=True):
        # eps - eps-hat is Gaussian: its mean square over n has the relative variance 2 / n
        assert value == pytest.approx(world.eps_mse(t), rel=4 * math.sqrt(2 / (2000 * DIMS)))
    with pytest.raises(InputError, match="no images"):
        eps_mse_table(model, [], times)


def test_eps_mse_table_sees_the_clipped_denoiser_and_the_conditions() -> None:
    class Loud(nn.Module):
        def forward(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
            return 9 * x * label.reshape(-1, 1, 1, 1)

    def table(clip_x0: bool, label: int) -> float:
        model = DiffusionModel(
            Loud(), BetaChain(CHAINS[3]), EpsParameterization(), TimeConditioning(), FixedLargeVariance(),
            PlainGaussian(levels=256), clip_x0,
        )  # fmt: skip
        cond = {"label": torch.full((50,), label)}
        batches = [(torch.zeros(50, 1, 4, 4, dtype=torch.float64), cond)]
        return eps_mse_table(model, batches, model.grid[3:], torch.Generator().manual_seed(0))[1][0]

    # of blank images x_T = sigma eps: with label 0 eps-hat is 0, and with 1 it is far off unless clipped
    sigma = math.sqrt(1 - world_of(3, "wide").abar[3])
    assert table(False, 0) == pytest.approx(1, rel=0.2)
    assert table(False, 1) == pytest.approx((1 - 9 * sigma) ** 2, rel=0.2)
    assert table(True, 1) < 1


@pytest.mark.parametrize("schedule", [LinearChain(1000), CosineChain(300), LinearGamma(T=50), BetaChain([0.3])])
def test_spread_times(schedule: Schedule) -> None:
    model = DiffusionModel(
        Zero(), schedule, EpsParameterization(), TimeConditioning(), FixedLargeVariance(), PlainGaussian(256)
    )
    for points in (2, 40, 5000):
        times = spread_times(model, points)
        assert set(times.tolist()) <= set(model.grid[1:].tolist())
        assert bool((times.diff() > 0).all()) and len(times) <= points
        assert times[0] == model.grid[1] and times[-1] == 1
        if points == 40 and schedule.T >= 50:
            # no gap is wider than the spacing, unless the chain itself has none between
            gammas = schedule.gamma(model.grid[1:])
            spacing = float(gammas[-1] - gammas[0]) / 39
            assert float(schedule.gamma(times).diff().max()) <= 2 * spacing + float(gammas.diff().max())
            assert len(times) >= 25
    with pytest.raises(InputError, match="points = 1"):
        spread_times(model, 1)


# --- the learned range


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0, 1.5])
def test_the_range_is_interpolated_in_the_logarithm(fraction: float) -> None:
    """Trap 8, and trap 6: a strided grid's own betas."""
    world = ScalarGaussianWorld(*DATA["wide"], CHAINS[10], "range", fraction)
    model, x = oracle_model(world), normal(2, 1, 3, 3)
    for indices in (list(range(11)), [0, 1, 4, 10], [0, 3, 10]):
        strided, times = respaced(world, indices), torch.tensor(indices, dtype=torch.float64) / 10
        for t in range(2, strided.T + 1):
            step = model.reverse_process.transition(x, times[t - 1], times[t])
            assert step.log_var.shape == x.shape and step.log_var.dtype == torch.float64
            expected = fraction * math.log(strided.betas[t - 1]) + (1 - fraction) * math.log(strided.beta_tilde(t))
            torch.testing.assert_close(step.log_var, torch.full_like(x, expected), rtol=1e-9, atol=0)
        first = decoder_gaussian(model, x, times[1], times[2])
        expected = fraction * math.log(strided.betas[0]) + (1 - fraction) * math.log(strided.beta_tilde(2))
        torch.testing.assert_close(first.log_var, torch.full_like(x, expected), rtol=1e-9, atol=0)


def test_the_variance_of_a_pixel_is_its_own_channel_s() -> None:
    """[B] times, B = C = H = W: the second half of the channels, pixel by pixel, and the first half is the mean's."""
    network = Scaled((4, 4, 4)).double()
    model = learned_model(network, BetaChain(CHAINS[10]), clip_x0=True)
    x, steps = normal(4, 4, 4, 4), torch.tensor([2, 5, 9, 10])
    times = steps.double() / 10
    prediction = model.reverse_process.denoiser(x, times)
    assert prediction.output.shape == x.shape
    torch.testing.assert_close(prediction.output, network.weight * x)
    assert prediction.variance_output is not None
    torch.testing.assert_close(prediction.variance_output, network.fraction_output.expand_as(x))
    log_var = model.reverse_process.transition(x, times - 0.1, times).log_var
    world = world_of(10, "wide")
    for k, t in enumerate(steps.tolist()):
        fraction = (network.fraction_output + 1) / 2
        expected = fraction * math.log(world.betas[t - 1]) + (1 - fraction) * math.log(world.beta_tilde(t))
        torch.testing.assert_close(log_var[k], expected, rtol=1e-9, atol=1e-9)


def test_a_range_needs_two_steps_and_channels_of_its_own() -> None:
    with pytest.raises(InputError, match="LearnedRangeVariance gives the decoder of a chain of T = 1"):
        learned_model(Scaled(), BetaChain([0.3]))
    model = learned_model(Scaled().double(), BetaChain(CHAINS[3]))
    with pytest.raises(InputError, match="T = 1"):
        model.with_steps(1)
    x = normal(2, 1, 4, 4)
    with pytest.raises(ValueError, match="variance_output"):
        model.reverse_process.transition(x, model.grid[1], model.grid[2], Prediction(x, x, x))


def test_a_distribution_from_a_prediction_is_the_one_that_the_denoiser_gives() -> None:
    network = Scaled().double()
    model, x = learned_model(network, BetaChain(CHAINS[10]), clip_x0=True), normal(3, 1, 4, 4)
    reverse, s, t = model.reverse_process, model.grid[4], model.grid[7]
    pairs = [
        (reverse.transition(x, s, t, reverse.denoiser(x, t)), reverse.transition(x, s, t)),
        (model.decoder_gaussian(x, prediction=reverse.denoiser(x, model.grid[1])), model.decoder_gaussian(x)),
    ]
    assert network.calls == 4
    for a, b in pairs:
        assert torch.equal(a.mean, b.mean) and torch.equal(a.log_var, b.log_var)


# --- the bound and the samplers under them


@pytest.mark.parametrize("form", [DenoisingElbo(), ConsistencyElbo(), TrajectoryElbo()], ids=lambda form: form.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", DATA)
def test_every_form_of_the_bound_is_exact(data: str, kind: str, form: ElboEstimator) -> None:
    world = world_of(10, data, kind)
    generator = torch.Generator().manual_seed(3)
    values = form(oracle_model(world), draw_data(world, (1500, 1, 4, 4), generator), generator).named()
    exact = world.terms()
    of_form = exact["consistency_form" if form.name == "consistency" else "denoising_form"]
    expected = {**of_form, "reconstruction": exact["reconstruction"]}
    for term in set(values) & set(expected):
        assert_mean(values[term] / DIMS, expected[term], max_se=0.015 * max(1.0, abs(expected[term])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("indices", [list(range(11)), [0, 1, 4, 10]])
def test_ancestral_samples_have_the_variance_of_the_strided_chain(indices: list[int], kind: str) -> None:
    world, generator = world_of(10, "wide", kind), torch.Generator().manual_seed(0)
    strided, grid = respaced(world, indices), torch.tensor(indices, dtype=torch.float64) / 10
    states = {1.0: torch.randn(2500, 1, 4, 4, generator=generator, dtype=torch.float64)}
    AncestralSampler()(
        oracle_model(world), states[1.0], grid=grid, generators=generator,
        callback=lambda x, s: states.__setitem__(float(s), x.clone()),
    )  # fmt: skip
    for t in range(strided.T, 1, -1):
        gain, offset = reverse_map(strided, t)
        residual = states[float(grid[t - 1])] - gain * states[float(grid[t])] - offset
        assert_moments(residual, 0.0, strided.reverse_var(t))


@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler(), DDIMSampler(1.0)])
@pytest.mark.parametrize("variance", [LearnedRangeVariance(), AnalyticVariance([-3.0, 4.0], [0.9, 0.01])])
def test_samplers_walk_every_grid(sampler: Sampler, variance: ReverseVariance) -> None:
    """Float32 images of grey levels from 1, 3 and all steps; deterministic DDIM does not look at the variance."""
    network = Scaled().float() if variance.network_outputs == 2 else Zero()
    model = DiffusionModel(
        network, CosineChain(20), EpsParameterization(), TimeConditioning(), variance, DiscretizedGaussian(levels=17)
    )
    for steps in (1, 3, 20):
        with torch.no_grad():
            images = sampler(
                model, normal(3, 1, 4, 4).float(), grid=strided_grid(model.grid, steps),
                generators=torch.Generator().manual_seed(0),
            )  # fmt: skip
        levels = (images + 1) * 8
        assert images.dtype == torch.float32 and float((levels - levels.round()).abs().max()) < 1e-5
        assert float(levels.min()) >= 0 and float(levels.max()) <= 16


# --- the hybrid objective


@pytest.mark.parametrize("times", [UniformTimes(), Fixed(1, 10), Fixed(7, 10)])
def test_the_mean_learns_from_the_noise_mse_alone(times: TimeSampler) -> None:
    """Also where the model clips: the objective sees the network's own prediction, far out of range here."""
    network = Scaled(scale=3.0).double()
    model, x0 = learned_model(network, BetaChain(CHAINS[10]), clip_x0=True), 0.5 * normal(6, 1, 4, 4)
    gradients, fractions = [], []
    for objective in (NoiseMSE(times), HybridObjective(times, vlb_weight=3.0)):
        network.zero_grad()
        objective(model, x0, torch.Generator().manual_seed(5)).sum().backward()
        assert network.weight.grad is not None
        gradients.append(network.weight.grad.clone())
        fractions.append(network.fraction_output.grad)
    assert torch.equal(*gradients) and bool((gradients[0] != 0).all())
    assert fractions[1] is not None and bool((fractions[1] != 0).all())
    assert network.calls == 2


@pytest.mark.parametrize("step", [1, 2, 6, 10])
def test_the_variance_learns_from_the_bound(step: int) -> None:
    """By hand: w T / D 1/2 [1 - (beta-tilde + |mean difference|^2) / sigma^2] d log sigma^2 / d output, each pixel."""
    world, network, weight = world_of(10, "wide"), Scaled().double(), 0.7
    model, x0 = learned_model(network, BetaChain(world.betas)), 0.5 * normal(5, 1, 4, 4)
    HybridObjective(Fixed(step, 10), weight)(model, x0, torch.Generator().manual_seed(5)).sum().backward()
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    abar, beta, small = world.abar, world.betas[step - 1], world.beta_tilde(max(step, 2))
    x_t = math.sqrt(abar[step]) * x0 + math.sqrt(1 - abar[step]) * eps
    x0_hat = (x_t - math.sqrt(1 - abar[step]) * network.weight * x_t) / math.sqrt(abar[step])
    c0 = math.sqrt(abar[step - 1]) * beta / (1 - abar[step])
    square = c0**2 * (x0 - x0_hat) ** 2 + (small if step > 1 else 0.0)
    fraction = (network.fraction_output + 1) / 2
    var = beta**fraction * small ** (1 - fraction)
    slope = 0.5 * (math.log(beta) - math.log(small))
    expected = weight * 10 / DIMS * 0.5 * (1 - square / var) * slope
    assert network.fraction_output.grad is not None
    torch.testing.assert_close(network.fraction_output.grad, expected.sum(0).detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("T", CHAINS)
def test_the_bound_s_part_is_unbiased(T: int) -> None:
    """Its average over the steps is -ELBO without prior matching, nats a dimension."""
    world = world_of(T, "wide", "range 0.3")
    model, generator = oracle_model(world), torch.Generator().manual_seed(0)
    x0 = draw_data(world, (1500, 1, 4, 4), generator)
    exact = world.terms()
    form = exact["denoising_form"]
    expected = form["denoising_matching"] - exact["reconstruction"]
    assert expected == pytest.approx(-form["elbo"] - form["prior_matching"])

    def vlb(times: TimeSampler, seed: int) -> Tensor:
        simple, hybrid = (
            objective(model, x0, torch.Generator().manual_seed(seed))
            for objective in (NoiseMSE(times), HybridObjective(times, vlb_weight=1.0))
        )
        return hybrid - simple

    per_step = torch.stack([vlb(Fixed(step, T), step) for step in range(1, T + 1)])
    assert_mean(per_step.mean(0), expected, max_se=0.012)
    assert_mean(vlb(UniformTimes(), 0), expected, max_se=0.2)


@pytest.mark.parametrize("decoder", [PlainGaussian(levels=256), DiscretizedGaussian(levels=256)])
@pytest.mark.parametrize("schedule", [BetaChain([0.2, 0.5]), CosineChain(1000), LinearGamma(T=2)])
def test_no_step_gives_a_gradient_that_is_not_finite(schedule: Schedule, decoder: Decoder) -> None:
    """Step 1 among others, x0-hat out of range by orders of magnitude at the other end, float32."""
    network = Scaled(scale=3.0).float()
    model, x0 = learned_model(network, schedule, decoder=decoder), (normal(8, 1, 4, 4) / 3).clamp(-1, 1).float()

    class Ends(TimeSampler):
        def forward(self, like: Tensor, generators: object = None) -> TimeDraw:
            position = torch.tensor([0.0, 0.999999] * 4, dtype=torch.float64)
            return TimeDraw(position, torch.ones_like(position))

    for times in (Ends(), Fixed(1, model.T), StratifiedTimes()):
        network.zero_grad()
        loss = HybridObjective(times)(model, x0, torch.Generator().manual_seed(0))
        assert loss.shape == (8,) and bool(loss.isfinite().all())
        loss.sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


@pytest.mark.parametrize("step", [2, 10])
def test_the_decoder_of_another_step_leaves_no_trace(step: int) -> None:
    """An x0-hat so far out that the decoder, which this step does not need, would have a gradient of NaN."""
    network = Scaled(scale=1e18).double()
    model = learned_model(network, BetaChain(CHAINS[10]), decoder=DiscretizedGaussian(levels=256))
    HybridObjective(Fixed(step, model.T))(model, normal(3, 1, 4, 4).clamp(-1, 1)).sum().backward()
    assert network.fraction_output.grad is not None and bool(network.fraction_output.grad.isfinite().all())


@pytest.mark.parametrize("through", ["hybrid", "bound"])
def test_learning_the_fraction_reaches_the_optimal_variance(through: str) -> None:
    """One fraction a step, the optimal mean: the minimum is the analytic variance, within the range."""
    T, world = 3, world_of(3, "wide")

    class Table(OptimalEps):
        def __init__(self) -> None:
            super().__init__(world.mean, world.var, world.abar)
            self.fractions = nn.Parameter(torch.zeros(T, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            output = self.fractions[(t * T).round().long() - 1].reshape(-1, 1, 1, 1)
            return torch.cat([super().forward(x, t), output.expand_as(x)], 1)

    network = Table()
    model, x0 = learned_model(network, BetaChain(world.betas)), draw_data(world, (2000, 1, 4, 4), torch.Generator())
    optimizer = torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe")
    objectives = (
        [HybridObjective(Fixed(step, T)) for step in range(1, T + 1)] if through == "hybrid"
        else [NegativeElbo(DenoisingElbo())]
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        # a loss of its own weight would stop the search early
        losses = [1e3 * objective(model, x0, torch.Generator().manual_seed(7)).mean() for objective in objectives]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    for step in range(1, T + 1):
        low, high = math.log(world.beta_tilde(max(step, 2))), math.log(world.betas[step - 1])
        fraction = (float(network.fractions[step - 1]) + 1) / 2
        reached = math.exp(fraction * high + (1 - fraction) * low)
        assert reached == pytest.approx(world.reverse_var(step), rel=4 * math.sqrt(2 / (2000 * DIMS)))
        if step > 1:
            assert 0 < fraction < 1


@pytest.mark.parametrize("variance", [FixedLargeVariance(), FixedSmallVariance(), AnalyticVariance([0.0], [0.5])])
def test_nothing_to_learn(variance: ReverseVariance) -> None:
    model = DiffusionModel(
        Zero(), BetaChain(CHAINS[3]), EpsParameterization(), TimeConditioning(), variance, PlainGaussian(levels=256)
    )
    with pytest.raises(InputError, match=rf"{type(variance).__name__} has nothing to learn: use NoiseMSE"):
        HybridObjective(UniformTimes()).check(model)


def test_a_negative_weight() -> None:
    with pytest.raises(InputError, match="vlb_weight = -1"):
        HybridObjective(UniformTimes(), -1.0)
