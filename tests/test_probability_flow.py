"""The probability-flow ODE in worlds whose flow and density are known, and the bits that a density is worth."""

import math

import pytest
import torch
from oracles import assert_mean
from torch import Tensor, nn
from worlds_chain import World, exploding, optimal_model, preserving
from worlds_flow import (
    CORRELATED,
    IMAGES,
    PIXELS,
    SCALAR,
    SCHEDULES,
    elementwise_model,
    gaussian_flow,
    mixture_flow,
    start,
)
from worlds_gaussian import CorrelatedGaussianWorld
from worlds_mixture import MixtureWorld

from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics import bits_per_dim, decoded_log_prob, dequantized_log_prob
from ddpm_lightning.ops import Generators, image_generators
from ddpm_lightning.process import (
    AnalyticVariance,
    DiffusionModel,
    EpsParameterization,
    FixedLargeVariance,
    GammaConditioning,
    PlainGaussian,
)
from ddpm_lightning.samplers import ExactDivergence, HutchinsonDivergence, ProbabilityFlow
from ddpm_lightning.schedules import BetaChain, LinearGamma, Schedule, VarianceExploding

WORLDS: dict[str, World] = {"scalar": SCALAR, "correlated": CORRELATED, "pixels": PIXELS, "images": IMAGES}


def state_log_prob(world: World, x_t: Tensor, alpha: Tensor, sigma2: Tensor) -> Tensor:
    """Exact log q(x_t) of images of independent events, ``[B]`` nats."""
    events = x_t.reshape(len(x_t), -1, world.dims)
    if isinstance(world, CorrelatedGaussianWorld):
        cov = alpha**2 * world.cov + sigma2 * world.eye
        return torch.distributions.MultivariateNormal(alpha * world.mean, cov).log_prob(events).sum(1)
    assert isinstance(world, MixtureWorld)
    return world.log_prob(events, alpha, sigma2).sum(1)


def first_states(world: World, count: int, alpha: Tensor, sigma2: Tensor) -> Tensor:
    """Draws from q(x_1), ``[count, 1, 2, 2]``."""
    generator = torch.Generator().manual_seed(0)
    x0 = world.draw((count, 1, 2, 2), generator)
    return alpha * x0 + sigma2.sqrt() * torch.randn(x0.shape, generator=generator, dtype=torch.float64)


# --- the map


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_map_of_a_gaussian_world_is_of_fourth_order(name: str) -> None:
    schedule, scales = SCHEDULES[name]
    model = optimal_model(CORRELATED, schedule, scales=scales)
    first, last = schedule.gamma(model.grid[[1, -1]])
    x1 = first_states(CORRELATED, 10, *scales(first))
    x_T = gaussian_flow(CORRELATED, x1, first, last, scales)
    size = float(x_T.abs().max())
    up = [float((ProbabilityFlow(n).encode(model, x1) - x_T).abs().max()) / size for n in (40, 80)]
    down = [float((ProbabilityFlow(n).decode(model, x_T) - x1).abs().max()) for n in (40, 80)]
    for errors in (up, down):
        assert errors[1] < 1e-4 and errors[1] < errors[0] / 10, errors


def test_the_map_of_a_mixture_keeps_quantiles() -> None:
    schedule = LinearGamma(-6.0, 8.0)
    model = optimal_model(PIXELS, schedule)
    x_T = start(model, (4, 1, 4, 4))
    expected = mixture_flow(PIXELS, x_T, schedule.gamma(model.grid[-1]), schedule.gamma(model.grid[1]))
    assert float((ProbabilityFlow(150).decode(model, x_T) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("world", ["correlated", "images"])
def test_encode_undoes_decode(world: str) -> None:
    model = optimal_model(WORLDS[world], LinearGamma(-6.0, 8.0))
    flow, x_T = ProbabilityFlow(100), start(model, (10, 1, 2, 2))
    x1 = flow.decode(model, x_T)
    assert x1.dtype == torch.float64 and float((x1 - x_T).abs().max()) > 0.1
    assert float((flow.encode(model, x1) - x_T).abs().max()) < 1e-5
    assert float((flow.decode(model, flow.encode(model, x1)) - x1).abs().max()) < 1e-5


# --- the density


@pytest.mark.parametrize(
    ("world", "name"), [*((world, "linear gamma") for world in WORLDS), ("correlated", "exploding")]
)
def test_log_likelihood_is_the_exact_one_of_the_state(world: str, name: str) -> None:
    """Up to a gamma at which nothing of the image is left, so that the prior is q(x_T); 1e-4 nats a dimension."""
    schedule: Schedule = LinearGamma(-6.0, 22.0)
    schedule, scales = (VarianceExploding(schedule), exploding) if name == "exploding" else (schedule, preserving)
    model = optimal_model(WORLDS[world], schedule, scales=scales)
    at_first = scales(schedule.gamma(model.grid[1]))
    x1 = first_states(WORLDS[world], 6, *at_first)
    result = ProbabilityFlow(30, tolerance=1e-2).log_likelihood(model, x1)
    assert result.log_prob.dtype == torch.float64 and result.log_prob.shape == (6,)
    off = (result.log_prob - state_log_prob(WORLDS[world], x1, *at_first)).abs()
    assert float(off.max()) < 1e-4 * 4
    # what is left to 1e-4 is the prior, which is no error of the solver
    assert bool((off < result.error + 1e-4).all()) and float(result.error.max()) <= 1e-2


@pytest.mark.parametrize("world", ["correlated", "images"])
def test_log_likelihood_under_a_prior_that_is_not_the_last_state_s(world: str) -> None:
    """A chain that leaves much of the image in x_T: log p(x_1) = log q(x_1) + log p(x_T) - log q(x_T)."""
    model = optimal_model(WORLDS[world], BetaChain([0.02, 0.1, 0.3, 0.2]))
    at_first, at_last = (preserving(gamma) for gamma in model.schedule.gamma(model.grid[[1, -1]]))
    x1 = first_states(WORLDS[world], 2, *at_first)
    result = ProbabilityFlow(30, max_steps=123).log_likelihood(model, x1)
    prior = model.prior(result.x_T).log_prob(result.x_T)
    last = state_log_prob(WORLDS[world], result.x_T, *at_last)
    assert float((prior - last).abs().max()) > 0.1
    expected = state_log_prob(WORLDS[world], x1, *at_first) + prior - last
    assert float((result.log_prob - expected).abs().max()) < 1e-4 * 4
    torch.testing.assert_close(result.x_T, ProbabilityFlow(123).encode(model, x1))


def test_hutchinson_is_unbiased() -> None:
    """One image, 500 draws, against the exact trace on the same grid."""
    schedule = LinearGamma(-6.0, 8.0)
    model, flow = optimal_model(CORRELATED, schedule), ProbabilityFlow(5, max_steps=23)
    x1 = first_states(CORRELATED, 1, *preserving(schedule.gamma(model.grid[1])))
    exact = float(flow.log_likelihood(model, x1, divergence=ExactDivergence()).log_prob)
    spread = []
    for probes in (1, 4):
        draws = flow.log_likelihood(
            model,
            x1.expand(500, -1, -1, -1),
            divergence=HutchinsonDivergence(probes),
            generators=torch.Generator().manual_seed(1),
        ).log_prob
        assert_mean(draws, exact, max_se=0.2)
        spread.append(float(draws.std()))
    assert spread[0] > 0.1 and spread[1] == pytest.approx(spread[0] / 2, rel=0.15)


@pytest.mark.parametrize("probes", [1, 3])
def test_hutchinson_is_exact_for_independent_pixels(probes: int) -> None:
    model, flow = optimal_model(PIXELS, LinearGamma(-6.0, 8.0)), ProbabilityFlow(5, max_steps=23)
    x1 = start(model, (3, 1, 2, 2))
    exact = flow.log_likelihood(model, x1).log_prob
    torch.testing.assert_close(flow.log_likelihood(model, x1, divergence=HutchinsonDivergence(probes)).log_prob, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_s_density_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    model = elementwise_model()
    x1, flow = start(model, (6, 1, 4, 4)).to(dtype), ProbabilityFlow(3, tolerance=14, max_steps=200)

    def run(order: list[int]) -> tuple[Tensor, ...]:
        generators: Generators = image_generators(4, order)
        result = flow.log_likelihood(model, x1[order], divergence=HutchinsonDivergence(2), generators=generators)
        return result.log_prob, result.x_T, result.error, result.steps, result.evaluations

    whole = run(list(range(6)))
    assert len(whole[3].unique()) > 1, "the images need different numbers of steps"
    for order in ([5, 0, 3], [2], list(range(5, -1, -1))):
        for part, all_of_it in zip(run(order), whole, strict=True):
            assert torch.equal(part, all_of_it[order])


def test_evaluations_are_those_made() -> None:
    model, flow = optimal_model(PIXELS, LinearGamma(-6.0, 8.0)), ProbabilityFlow(7)
    x = start(model, (2, 1, 2, 2))
    calls: list[None] = []
    model.network.register_forward_hook(lambda *_: calls.append(None))
    flow.encode(model, x)
    flow.decode(model, x)
    assert len(calls) == 2 * 4 * 7
    calls.clear()
    result = flow.log_likelihood(model, x[:1])
    assert int(result.evaluations) == len(calls) and int(result.steps) in (31, 63, 127)


def test_the_density_of_images_is_that_of_the_first_state_in_their_units() -> None:
    """x_1 / alpha_1 is x_0 with noise of variance exp(gamma_1)."""
    schedule = LinearGamma(-4.0, 22.0)
    model = optimal_model(IMAGES, schedule)
    x0 = IMAGES.draw((6, 1, 2, 2), torch.Generator().manual_seed(0))
    result = ProbabilityFlow(30, 1e-3).image_log_likelihood(model, x0)
    gamma = schedule.gamma(model.grid[1])
    expected = IMAGES.log_prob(x0.reshape(6, 4), 1.0, torch.exp(gamma))
    assert float((result.log_prob - expected).abs().max()) < 1e-4 * 4
    assert 4 * float(model.schedule.log_alpha(model.grid[1])) < -0.03


# --- the error


class RoughNetwork(nn.Module):
    """Of data N(0, I): the optimal eps, sigma z, and r(gamma) z beyond it. Then dz/d gamma = s r z / 2."""

    def __init__(self, period: float, phase: float) -> None:
        super().__init__()
        self.period, self.phase = period, phase

    def rough(self, gamma: Tensor) -> Tensor:
        return 0.3 * torch.exp(3 * (torch.cos(2 * math.pi * (gamma - self.phase) / self.period) - 1))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gamma = 20 * c.double().reshape(-1, 1, 1, 1)
        return (torch.sigmoid(gamma).sqrt() + self.rough(gamma)) * x.double()

    def growth(self, first: float, last: float) -> Tensor:
        """log |z_T / z_1|, the integral of s r / 2, by the midpoint rule on 200,000 points."""
        gamma = first + (last - first) * (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        return (0.5 * torch.sigmoid(gamma).sqrt() * self.rough(gamma)).mean() * (last - first)


@pytest.mark.parametrize("waves", [9.0, 24.0, 48.0])
def test_a_rough_network_is_integrated_within_the_stated_error(waves: float) -> None:
    """``waves`` along the path. 24 and 48 have the same phase at all nodes of 12 steps; 48 at those of 24 steps too."""
    schedule = LinearGamma(-6.0, 8.0)
    first, last = schedule.gamma(schedule.grid()[[1, -1]]).tolist()
    network = RoughNetwork((last - first) / waves, first)
    model = DiffusionModel(
        network, schedule, EpsParameterization(), GammaConditioning(), FixedLargeVariance(), PlainGaussian(256), False
    )
    x1 = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    growth, probe = network.growth(first, last), HutchinsonDivergence()  # exact for independent pixels
    exact = (growth - 0.5 * ((torch.exp(growth) * x1).square() + math.log(2 * math.pi))).flatten(1).sum(1)
    # twelve steps alone are wrong: the trace of the Jacobian adds up to 16 log |x_T / x_1|
    twelve = torch.log(ProbabilityFlow(12).encode(model, x1) / x1).mean()
    assert 16 * abs(float(twelve - growth)) > 0.25
    result = ProbabilityFlow(12, tolerance=0.1).log_likelihood(model, x1, divergence=probe)
    off = (result.log_prob - exact).abs()
    assert float(result.error.max()) <= 0.1 and bool((off <= result.error).all()), (off, result)


def test_an_error_that_cannot_be_made_small_is_told() -> None:
    """Steps end before the tolerance is met, after two changes and after three."""
    schedule = LinearGamma(-6.0, 22.0)
    model, tried = optimal_model(IMAGES, schedule), (7, 15, 31, 63)
    scales = preserving(schedule.gamma(model.grid[1]))
    x1 = first_states(IMAGES, 4, *scales)
    exact = state_log_prob(IMAGES, x1, *scales)
    for limit in tried[2:]:
        result = ProbabilityFlow(7, 1e-9, limit + 1).log_likelihood(model, x1)
        assert result.steps.tolist() == [limit] * 4
        assert result.evaluations.tolist() == [4 * sum(n for n in tried if n <= limit)] * 4
        assert bool((result.error > 1e-9).all()) and bool(((result.log_prob - exact).abs() <= result.error).all())


# --- bits


@pytest.mark.parametrize(("levels", "bits"), [(256, 8.0), (17, math.log2(17)), (2, 1.0)])
def test_a_uniform_density_is_worth_log2_levels_bits(levels: int, bits: float) -> None:
    """Trap 17: 8.000 bits/dim for 256 levels, every level's bin of the same width."""
    images = 2 * torch.arange(levels, dtype=torch.float64).reshape(1, 1, 1, levels) / (levels - 1) - 1
    width = 2 * levels / (levels - 1)

    def uniform(x: Tensor) -> Tensor:
        assert float(x.abs().max()) <= width / 2
        return torch.full((len(x),), -x[0].numel() * math.log(width), dtype=torch.float64)

    nats = dequantized_log_prob(uniform, images, levels, torch.Generator().manual_seed(0))
    assert -bits_per_dim(float(nats), levels) == pytest.approx(bits, abs=1e-12)


def test_noise_fills_the_bin_of_each_level_evenly() -> None:
    x0 = 2 * torch.randint(256, (4, 1, 50, 50), generator=torch.Generator().manual_seed(0)).float() / 255 - 1

    def noisy(images: Tensor, generators: Generators) -> Tensor:
        """What the density is asked for."""
        seen: list[Tensor] = []

        def density(x: Tensor) -> Tensor:
            seen.append(x)
            return x.new_zeros(len(x))

        dequantized_log_prob(density, images, 256, generators)
        return seen[0]

    x = noisy(x0, image_generators(1, range(4)))
    u = ((x - x0.double()) * 255 / 2 + 0.5).flatten()
    assert x.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) <= 1
    rank = torch.arange(1, len(u) + 1, dtype=torch.float64) / len(u)
    assert float((u.sort().values - rank).abs().max()) < 2.3 / math.sqrt(len(u))
    assert torch.equal(noisy(x0[2:3], image_generators(1, [2])), x[2:3])


def test_the_dequantised_bound_is_close_where_the_density_is_smooth() -> None:
    """Bins of 2/255 under modes of width 0.2: log P(level) is log density + log width but for curvature."""
    levels = 256
    x0 = (2 * torch.randint(60, 200, (400, 1, 2, 2), generator=torch.Generator().manual_seed(0)).double() / 255) - 1
    delta = 2 / (levels - 1)
    exact = torch.log(PIXELS.cdf(x0 + delta / 2) - PIXELS.cdf(x0 - delta / 2)).flatten(1).sum(1)

    def density(x: Tensor) -> Tensor:
        return PIXELS.log_prob(x.reshape(len(x), -1, 1)).sum(1)

    estimates = dequantized_log_prob(density, x0, levels, torch.Generator().manual_seed(1))
    # the bound's gap is of second order in the width of a bin: far below the standard error
    assert_mean(estimates - exact, 0.0, max_se=0.002)


def test_the_exact_decoder_gives_every_draw_the_exact_likelihood() -> None:
    """Where p(x_0 | x_1) and p(x_1) are exact, so is the sum, whatever x_1 is drawn; with another decoder it is a
    bound."""
    schedule = LinearGamma(-2.0, 22.0)
    gamma = schedule.gamma(torch.tensor(0.0, dtype=torch.float64))
    var = float(SCALAR.cov[0, 0])
    eps_mse = float(var / (var + torch.exp(gamma)))
    x0 = SCALAR.draw((400, 1, 2, 2), torch.Generator().manual_seed(0))
    exact = torch.distributions.Normal(SCALAR.mean, var**0.5).log_prob(x0).flatten(1).sum(1)

    model = optimal_model(SCALAR, schedule, variance=AnalyticVariance([float(gamma)], [eps_mse]))
    flow = ProbabilityFlow(30, 1e-3)
    estimate = decoded_log_prob(
        lambda x1: flow.log_likelihood(model, x1).log_prob, model, x0[:6], image_generators(1, range(6))
    )
    assert float((estimate - exact[:6]).abs().max()) < 1e-4 * 4

    model = optimal_model(SCALAR, schedule, variance=AnalyticVariance([float(gamma)], [2 * eps_mse]))
    alpha, sigma2 = preserving(gamma)
    bound = decoded_log_prob(
        lambda x1: state_log_prob(SCALAR, x1, alpha, sigma2), model, x0, torch.Generator().manual_seed(1)
    )
    # KL between the exact decoder and one of twice its variance, four pixels
    kl = 4 * 0.5 * (0.5 - 1 + math.log(2))
    assert_mean(exact - bound, kl, max_se=0.05)


# --- bad input


@pytest.mark.parametrize("number", [0, -1])
def test_input_errors(number: int) -> None:
    with pytest.raises(InputError, match=f"steps = {number} must be 1 or more"):
        ProbabilityFlow(number)
    with pytest.raises(InputError, match=f"tolerance = {number} must be positive"):
        ProbabilityFlow(5, tolerance=number)
    with pytest.raises(InputError, match=f"max_steps = {22 + number} must be 23 or more"):
        ProbabilityFlow(5, max_steps=22 + number)
    with pytest.raises(InputError, match=f"probes = {number} must be 1 or more"):
        HutchinsonDivergence(number)
    with pytest.raises(InputError, match=f"levels = {number} must be 2 or more"):
        dequantized_log_prob(lambda x: x.new_zeros(len(x)), torch.zeros(1, 1, 2, 2), number)


def test_a_chain_of_one_state_has_no_flow() -> None:
    model: DiffusionModel = optimal_model(PIXELS, BetaChain([0.5]))
    with pytest.raises(InputError, match="for a chain of one state"):
        ProbabilityFlow(5).encode(model, torch.zeros(1, 1, 2, 2))
