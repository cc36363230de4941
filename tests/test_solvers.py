"""DPM-Solver++ and Heun's method against the exact flow of worlds in closed form: orders, marginals, contract."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from worlds_chain import exploding, optimal_model, preserving
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

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import DiffusionModel, FixedSmallVariance
from ddpm_lightning.samplers import AncestralSampler, Context, DDIMSampler, DPMSolverSampler, HeunSampler, Sampler
from ddpm_lightning.schedules import LinearGamma, Schedule, VarianceExploding, karras_grid, logsnr_grid

ORDERS: list[tuple[Sampler, int]] = [
    (DDIMSampler(), 1),
    (DPMSolverSampler(1), 1),
    (DPMSolverSampler(), 2),
    (HeunSampler(), 2),
]
SECOND: list[Sampler] = [DPMSolverSampler(), DPMSolverSampler(sde=True), HeunSampler()]
NEW: list[Sampler] = [*SECOND, DPMSolverSampler(1, sde=True)]
GRIDS: dict[str, Callable[[Schedule, Tensor, int], Tensor]] = {"logsnr": logsnr_grid, "karras": karras_grid}


def states_of(
    sampler: Sampler, model: DiffusionModel, x_T: Tensor, grid: Tensor, seed: int = 1
) -> tuple[list[Tensor], Tensor]:
    """x_T, ..., x_1, and the image."""
    states = [x_T]
    image = sampler(
        model,
        x_T,
        grid=grid,
        generators=torch.Generator().manual_seed(seed),
        callback=lambda x, s: states.append(x.clone()),
    )
    return states[:-1], image


def order_of(sampler: Sampler, model: DiffusionModel, x_T: Tensor, exact: Tensor, grids: list[Tensor]) -> float:
    """Measured order of the mean error of x_1, from two grids of which the second halves the step."""
    errors = [float((states_of(sampler, model, x_T, grid)[0][-1] - exact).abs().mean()) for grid in grids]
    assert errors[-1] < 0.1
    return math.log2(errors[-2] / errors[-1])


# --- measured orders


@pytest.mark.parametrize(
    ("name", "spacing"), [*((name, "logsnr") for name in SCHEDULES), ("linear gamma", "karras"), ("chain", "karras")]
)
@pytest.mark.parametrize(("sampler", "order"), ORDERS)
def test_order_in_the_gaussian_world(sampler: Sampler, order: int, name: str, spacing: str) -> None:
    schedule, scales = SCHEDULES[name]
    model = optimal_model(CORRELATED, schedule, scales=scales)
    x_T = start(model, (20, 1, 2, 2))
    first, last = schedule.gamma(model.grid[[1, -1]])
    exact = gaussian_flow(CORRELATED, x_T, last, first, scales)
    grids = [GRIDS[spacing](schedule, model.grid, n + 1) for n in (80, 160)]
    assert order - 0.2 < order_of(sampler, model, x_T, exact, grids) < order + 0.3


@pytest.mark.parametrize(("sampler", "order"), ORDERS)
def test_order_in_a_world_that_is_not_linear(sampler: Sampler, order: int) -> None:
    schedule = LinearGamma(-6.0, 8.0)
    model = optimal_model(PIXELS, schedule)
    x_T = start(model, (4, 1, 4, 4))
    exact = mixture_flow(PIXELS, x_T, schedule.gamma(model.grid[-1]), schedule.gamma(model.grid[1]))
    grids = [logsnr_grid(schedule, model.grid, n + 1) for n in (200, 400)]
    assert order - 0.2 < order_of(sampler, model, x_T, exact, grids) < order + 0.3


# --- what order 1 is


@pytest.mark.parametrize("name", SCHEDULES)
def test_order_1_is_ddim_and_ancestral_sampling(name: str) -> None:
    schedule, scales = SCHEDULES[name]
    model = optimal_model(IMAGES, schedule, variance=FixedSmallVariance(), scales=scales)
    x_T, grid = start(model, (5, 1, 2, 2)), logsnr_grid(schedule, model.grid, 7)
    for ours, theirs in [
        (DPMSolverSampler(1), DDIMSampler()),
        (DPMSolverSampler(1, sde=True), AncestralSampler()),
    ]:
        for x, y in zip(*(states_of(sampler, model, x_T, grid)[0] for sampler in (ours, theirs)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    first = [DPMSolverSampler(order).step(Context(model), x_T, grid[-1], grid[-2])[0] for order in (1, 2)]
    assert torch.equal(*first)


# --- distributions, on fine grids


@pytest.mark.parametrize("name", ["linear gamma", "exploding"])
@pytest.mark.parametrize("sampler", SECOND)
@pytest.mark.parametrize("world", [SCALAR, CORRELATED], ids=["scalar", "correlated"])
def test_states_and_images_of_a_gaussian_world(world: CorrelatedGaussianWorld, sampler: Sampler, name: str) -> None:
    """Mean and covariance within 4 standard errors of the exact ones."""
    schedule: Schedule = LinearGamma(-9.0, 12.0)
    schedule, scales = (VarianceExploding(schedule), exploding) if name == "exploding" else (schedule, preserving)
    model = optimal_model(world, schedule, scales=scales)
    grid = logsnr_grid(schedule, model.grid, 161)
    states, image = states_of(sampler, model, start(model, (4000, 1, 2, 2)), grid)
    gammas = schedule.gamma(grid[1:]).flip(0)
    cases = [(states[i], *scales(gammas[i])) for i in (40, 80, 120, 160)]
    for x, alpha, sigma2 in [*cases, (image, gammas.new_ones(()), gammas.new_zeros(()))]:
        events = x.reshape(-1, world.dims)
        cov = alpha**2 * world.cov + sigma2 * world.eye
        variances, n = cov.diagonal(), len(events)
        mean_se, cov_se = torch.sqrt(variances / n), torch.sqrt((variances[:, None] * variances + cov**2) / n)
        assert bool(((events.mean(0) - alpha * world.mean).abs() <= 4 * mean_se).all())
        assert bool(((events.T.cov().reshape(cov.shape) - cov).abs() <= 4 * cov_se).all())


def sde_variance(order: int, model: DiffusionModel, grid: Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """The exact variance of the SDE solver's x_1 in the scalar world, where x_1 is linear in x_T and in the noise of
    each step: one image for each of them, with 1 there and 0 elsewhere, and one with 0 everywhere."""
    x_T = torch.zeros(len(grid), 1, 1, 1, dtype=torch.float64)
    x_T[1] = 1
    step = iter(range(2, len(grid)))

    def impulse(x: Tensor, generators: object) -> Tensor:
        noise = torch.zeros_like(x)
        noise[next(step)] = 1
        return noise

    monkeypatch.setattr("ddpm_lightning.samplers.dpm_solver.randn_like", impulse)
    x1 = states_of(DPMSolverSampler(order, sde=True), model, x_T, grid)[0][-1].flatten()
    assert next(step, None) is None
    return float((x1[1:] - x1[0]).square().sum())


def test_the_second_order_sde_has_less_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sampling error: order 1 loses variance in proportion to the step, order 2 less than a third of that."""
    schedule = LinearGamma(-6.0, 8.0)
    model = optimal_model(SCALAR, schedule)
    alpha, sigma2 = preserving(schedule.gamma(model.grid[1]))
    exact = float(alpha**2 * SCALAR.cov[0, 0] + sigma2)
    grids = [logsnr_grid(schedule, model.grid, n + 1) for n in (100, 200)]
    first, second = ([sde_variance(order, model, grid, monkeypatch) / exact - 1 for grid in grids] for order in (1, 2))
    assert first[1] < -0.01 and 0.8 < math.log2(first[0] / first[1]) < 1.3
    assert abs(second[1]) < 0.3 * abs(first[1]) and abs(second[1]) < abs(second[0])


@pytest.mark.parametrize("sampler", SECOND)
def test_states_of_a_mixture_have_its_marginals(sampler: Sampler) -> None:
    """Kolmogorov's distance; one event in 16,000 exceeds 2.3 / sqrt(N) by chance."""
    schedule = LinearGamma(-9.0, 9.0)
    model = optimal_model(PIXELS, schedule)
    grid = logsnr_grid(schedule, model.grid, 161)
    states, _ = states_of(sampler, model, start(model, (600, 1, 4, 4)), grid)
    gammas = schedule.gamma(grid[1:]).flip(0)
    for i in (40, 80, 120, 160):
        x = states[i].flatten().sort().values
        rank = torch.arange(1, len(x) + 1, dtype=torch.float64) / len(x)
        kolmogorov = float((PIXELS.cdf(x, *preserving(gammas[i])) - rank).abs().max())
        assert kolmogorov < 2.3 / math.sqrt(len(x)), (i, kolmogorov)


@pytest.mark.parametrize("sampler", SECOND)
def test_images_of_a_mixture_have_its_weights(sampler: Sampler) -> None:
    schedule = LinearGamma(-9.0, 9.0)
    model = optimal_model(IMAGES, schedule)
    grid = logsnr_grid(schedule, model.grid, 101)
    _, image = states_of(sampler, model, start(model, (6000, 1, 2, 2)), grid)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def responsibility(x: Tensor) -> Tensor:
        return IMAGES.responsibilities(x, one, zero)[:, 0]

    share = responsibility(image.reshape(-1, 4))
    truth = responsibility(IMAGES.sample(400_000, torch.Generator().manual_seed(2)))
    assert abs(float(share.mean() - truth.mean())) < 4 * float(truth.std()) / math.sqrt(len(share))


# --- the contract of all samplers


@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler(), *NEW])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluations_are_those_made(sampler: Sampler, steps: int) -> None:
    model = optimal_model(PIXELS, LinearGamma(-6.0, 8.0))
    calls: list[None] = []
    model.network.register_forward_hook(lambda *_: calls.append(None))
    states, _ = states_of(sampler, model, start(model, (1, 1, 2, 2)), logsnr_grid(model.schedule, model.grid, steps))
    assert len(calls) == sampler.evaluations(steps) and len(states) == steps
    assert sampler.evaluations(5) == (9 if isinstance(sampler, HeunSampler) else 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampler", NEW)
def test_an_image_does_not_depend_on_the_batch(sampler: Sampler, dtype: torch.dtype) -> None:
    model = elementwise_model()
    x_T, grid = start(model, (6, 1, 4, 4)).to(dtype), logsnr_grid(model.schedule, model.grid, 6)

    def run(order: list[int]) -> Tensor:
        return sampler(model, x_T[order], grid=grid, generators=image_generators(4, order))

    whole = run(list(range(6)))
    assert whole.dtype == dtype
    for order in ([5, 0, 3], [2], list(range(5, -1, -1))):
        assert torch.equal(run(order), whole[order])
    if getattr(sampler, "sde", False):
        assert bool((sampler(model, x_T, grid=grid, generators=image_generators(5, range(6))) != whole).any())


@pytest.mark.parametrize("sampler", NEW)
def test_one_sampler_serves_two_walks_at_once(sampler: Sampler) -> None:
    """A second walk inside each step of the first leaves both as they are alone."""
    model = optimal_model(PIXELS, LinearGamma(-6.0, 8.0))
    grid = logsnr_grid(model.schedule, model.grid, 6)
    batches = [start(model, (2, 1, 4, 4), seed) for seed in (0, 1)]

    def run(x_T: Tensor, callback: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        return sampler(model, x_T, grid=grid, generators=torch.Generator().manual_seed(3), callback=callback)

    alone = [run(x_T) for x_T in batches]
    inner: list[Tensor] = []
    before = vars(sampler).copy()
    outer = run(batches[0], lambda x, s: inner.append(run(batches[1])))
    assert torch.equal(outer, alone[0]) and all(torch.equal(x, alone[1]) for x in inner) and len(inner) == 6
    assert vars(sampler) == before


def test_the_state_is_the_last_prediction() -> None:
    model = optimal_model(PIXELS, LinearGamma(-6.0, 8.0))
    x_t, sampler = start(model, (2, 1, 4, 4)), DPMSolverSampler()
    t, s = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    x_s, state = sampler.step(Context(model), x_t, t, s)
    assert state is not None and state.t == t
    assert torch.equal(state.x0, model.denoiser(x_t, t).x0)
    with_it, without = (sampler.step(Context(model), x_s, s, 0.5 * s, before)[0] for before in (state, None))
    assert float((with_it - without).abs().max()) > 1e-3
    assert DDIMSampler().step(Context(model), x_t, t, s)[1] is None


@pytest.mark.parametrize("order", [0, 3, -1])
def test_order_errors(order: int) -> None:
    with pytest.raises(InputError, match=f"order = {order} must be 1 or 2"):
        DPMSolverSampler(order)


@pytest.mark.parametrize("grid", [[-1.0], [-1.0, 0.5], [0.1, 1.0], [-1.0, 0.5, 0.5, 1.0], [-1.0, 0.7, 0.5, 1.0], []])
@pytest.mark.parametrize("sampler", NEW)
def test_grid_errors(sampler: Sampler, grid: list[float]) -> None:
    model = optimal_model(PIXELS, LinearGamma(-6.0, 8.0))
    with pytest.raises(InputError, match="grid must increase from -1, the time of the data, to 1"):
        sampler(model, start(model, (1, 1, 4, 4)), grid=torch.tensor(grid, dtype=torch.float64))
