"""Samplers in a world where the distribution of every state is known, and against the lecture's own loop."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import (
    ScalarGaussianWorld,
    assert_moments,
    linear_betas,
    marginal_moments,
    oracle_model,
    respaced,
    reverse_map,
    x0_map,
)
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    PlainGaussian,
    Prediction,
    TimeConditioning,
)
from ddpm_lightning.samplers import AncestralSampler, Context, DDIMSampler, Sampler
from ddpm_lightning.schedules import BetaChain, CosineChain, LinearChain, chain_grid, strided_grid

T = 20
BETAS = linear_betas(T, 0.02, 0.4)
WORLDS = {variance: ScalarGaussianWorld(0.3, 0.25, BETAS, variance) for variance in ("beta", "posterior")}


class Convolution(nn.Module):
    """A fixed random network that mixes neighbouring pixels and sees t."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("kernel", 0.3 * torch.randn(1, 1, 3, 3, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        mixed = nn.functional.conv2d(x, self.kernel.to(x.dtype), padding=1)
        return torch.tanh(mixed + t.reshape(-1, 1, 1, 1))


class Elementwise(nn.Module):
    """Large outputs, so that clipping has work to do."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 2 * torch.cos(3 * x) + t.reshape(-1, 1, 1, 1)


def start(count: int, dtype: torch.dtype = torch.float64, size: int = 4) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def walk(sampler: Sampler, model: DiffusionModel, x_T: Tensor, grid: Tensor | None = None) -> dict[float, Tensor]:
    """Every state by its time, noise from one generator."""
    states = {1.0: x_T}
    sampler(
        model,
        x_T,
        grid=grid,
        generators=torch.Generator().manual_seed(2),
        callback=lambda x, s: states.__setitem__(float(s), x.clone()),
    )
    return states


def grids() -> list[list[int]]:
    """Indices of the full chain, of strided ones and of an uneven one."""
    strided = [(strided_grid(chain_grid(T), steps) * T).round().long().tolist() for steps in (T, 10, 7, 2, 1)]
    return [*strided, [0, 1, 2, 15, 20]]


# --- ancestral sampling


@pytest.mark.parametrize("variance", WORLDS)
@pytest.mark.parametrize("indices", grids())
def test_ancestral_moments_at_every_index(indices: list[int], variance: str) -> None:
    """Traps 2 and 6: x_s = gain x_t + offset + noise of the strided chain's own variance, at each s > 0."""
    world = respaced(WORLDS[variance], indices)
    grid = torch.tensor(indices, dtype=torch.float64) / T
    states = walk(AncestralSampler(), oracle_model(WORLDS[variance]), start(2500), grid)
    assert len(states) == len(indices)
    mean, var = 0.0, 1.0
    for i in range(world.T, 0, -1):
        assert_moments(states[float(grid[i])], mean, var)
        gain, offset = reverse_map(world, i)
        # the last step is the decoder's mode and adds no noise
        noise = world.reverse_var(i) if i > 1 else 0.0
        mean, var = gain * mean + offset, gain**2 * var + noise
    assert_moments(states[0.0], mean, var)


@pytest.mark.parametrize("variance", WORLDS)
def test_each_step_adds_the_reverse_variance(variance: str) -> None:
    """Trap 2: noise at every index above 1, none at the last."""
    world = WORLDS[variance]
    states = walk(AncestralSampler(), oracle_model(world), start(2500))
    for t in range(T, 0, -1):
        gain, offset = reverse_map(world, t)
        residual = states[(t - 1) / T] - gain * states[t / T] - offset
        if t > 1:
            assert_moments(residual, 0.0, world.reverse_var(t))
        else:
            assert float(residual.abs().max()) < 1e-12


def test_marginals_are_those_of_the_forward_process() -> None:
    """Trap 3: under the optimal denoiser every state of a long chain is distributed as q(x_t)."""
    world = ScalarGaussianWorld(0.3, 0.25, linear_betas(300, 1e-4 * 10 / 3, 0.02 * 10 / 3), "beta")
    assert world.abar[-1] < 1e-4
    states = walk(AncestralSampler(), oracle_model(world), start(1500))
    for t in range(1, 301):
        mean, var = marginal_moments(world, t)
        x_t = states[t / 300]
        assert float(x_t.mean()) == pytest.approx(mean, abs=0.005 + 4 * math.sqrt(var / x_t.numel()))
        assert float(x_t.var()) == pytest.approx(var, rel=0.015 + 4 * math.sqrt(2 / x_t.numel()))


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler(), DDIMSampler(0.5)])
def test_a_grid_of_all_steps_is_the_full_chain(sampler: Sampler, clip_x0: bool) -> None:
    model = small_model(Convolution(), clip_x0=clip_x0)
    full, strided = walk(sampler, model, start(4)), walk(sampler, model, start(4), strided_grid(chain_grid(T), T))
    assert full.keys() == strided.keys()
    assert all(torch.equal(full[s], strided[s]) for s in full)


# --- DDIM


def small_model(network: nn.Module, *, clip_x0: bool, large: bool = True) -> DiffusionModel:
    return DiffusionModel(
        network=network,
        schedule=BetaChain(BETAS),
        parameterization=EpsParameterization(),
        conditioning=TimeConditioning(),
        variance=FixedLargeVariance() if large else FixedSmallVariance(),
        decoder=PlainGaussian(levels=256),
        clip_x0=clip_x0,
    )


@pytest.mark.parametrize("indices", grids())
def test_deterministic_ddim_is_a_linear_map(indices: list[int]) -> None:
    """eta = 0: x_s = sqrt(abar_s) E[x_0|x_t] + sqrt(1 - abar_s) E[eps|x_t], nothing drawn."""
    world = WORLDS["beta"]
    model, x_T = oracle_model(world), start(3)
    grid = torch.tensor(indices, dtype=torch.float64) / T
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    states = {1.0: x_T}
    DDIMSampler()(
        model, x_T, grid=grid, generators=generator, callback=lambda x, s: states.__setitem__(float(s), x.clone())
    )
    assert torch.equal(generator.get_state(), before)
    for s, t in pairwise(indices):
        gain, offset = x0_map(world, t)
        abar_s, abar_t = world.abar[s], world.abar[t]
        x_t = states[t / T]
        x0 = gain * x_t + offset
        eps = (x_t - math.sqrt(abar_t) * x0) / math.sqrt(1 - abar_t)
        expected = math.sqrt(abar_s) * x0 + math.sqrt(1 - abar_s) * eps
        torch.testing.assert_close(states[s / T], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("indices", grids())
def test_stochastic_ddim_moments(indices: list[int], eta: float) -> None:
    """v = eta^2 beta~ of the strided chain is added, and the eps part shrinks to sqrt(1 - abar_s - v)."""
    world = respaced(WORLDS["posterior"], indices)
    grid = torch.tensor(indices, dtype=torch.float64) / T
    states = walk(DDIMSampler(eta), oracle_model(WORLDS["posterior"]), start(2500), grid)
    mean, var = 0.0, 1.0
    for i in range(world.T, 0, -1):
        assert_moments(states[float(grid[i])], mean, var)
        noise = eta**2 * world.beta_tilde(i)
        gain, offset = x0_map(world, i)
        root = math.sqrt(world.abar[i])
        eps_scale = math.sqrt(1 - world.abar[i - 1] - noise) / math.sqrt(1 - world.abar[i])
        step_gain = math.sqrt(world.abar[i - 1]) * gain + eps_scale * (1 - root * gain)
        step_offset = (math.sqrt(world.abar[i - 1]) - eps_scale * root) * offset
        residual = states[float(grid[i - 1])] - step_gain * states[float(grid[i])] - step_offset
        if i > 1:
            assert_moments(residual, 0.0, noise)
        mean, var = step_gain * mean + step_offset, step_gain**2 * var + noise


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("steps", [T, 6])
def test_ddim_with_eta_one_is_ancestral_with_the_small_variance(steps: int, clip_x0: bool) -> None:
    model = small_model(Convolution(), clip_x0=clip_x0, large=False)
    grid = strided_grid(chain_grid(T), steps)
    ancestral = walk(AncestralSampler(), model, start(4), grid)
    ddim = walk(DDIMSampler(1.0), model, start(4), grid)
    for s in ancestral:
        torch.testing.assert_close(ddim[s], ancestral[s], rtol=1e-9, atol=1e-9)


def test_ddim_uses_the_eps_that_belongs_to_the_clipped_image() -> None:
    """Trap 4: x_t = alpha_t x0 + sigma_t eps holds for what the step is made of, also where x0 was clipped."""
    model = small_model(Elementwise(), clip_x0=True)
    x_t = start(4)
    clipped = 0
    for t in (20, 13, 5, 2):
        s = t - 1
        abar_s, abar_t = (WORLDS["beta"].abar[i] for i in (s, t))
        raw = model.denoiser(x_t, model.grid[t]).x0
        x0 = raw.clamp(-1, 1)
        clipped += int((raw != x0).sum())
        eps = (x_t - math.sqrt(abar_t) * x0) / math.sqrt(1 - abar_t)
        expected = math.sqrt(abar_s) * x0 + math.sqrt(1 - abar_s) * eps
        grid_t, grid_s = model.grid[t], model.grid[s]
        torch.testing.assert_close(
            DDIMSampler().step(Context(model), x_t, grid_t, grid_s)[0], expected, rtol=1e-9, atol=1e-9
        )
        prediction: Prediction = model.reverse_process.denoiser(x_t, grid_t)
        rebuilt = math.sqrt(abar_t) * prediction.x0 + math.sqrt(1 - abar_t) * prediction.eps
        torch.testing.assert_close(rebuilt, x_t, rtol=1e-9, atol=1e-9)
    assert clipped > 20


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_errors(eta: float) -> None:
    with pytest.raises(InputError, match=r"eta = .* must lie between 0 and 1"):
        DDIMSampler(eta)


# --- the lecture's loop


def lecture_loop(network: nn.Module, x: Tensor, betas: list[float], generator: torch.Generator) -> Tensor:
    """Algorithm 2 of Ho et al. as the lecture prints it, with t from T down to 1."""
    T = len(betas)
    beta, alpha, abar = [0.0, *betas], [1.0], [1.0]
    for b in betas:
        alpha.append(1 - b)
        abar.append(abar[-1] * (1 - b))
    for t in range(T, 0, -1):
        eps = network(x, torch.full((len(x),), t / T, dtype=x.dtype))
        x = (x - beta[t] / math.sqrt(1 - abar[t]) * eps) / math.sqrt(alpha[t])
        if t > 1:
            x = x + math.sqrt(beta[t]) * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("T", "beta_end"), [(1, 0.3), (2, 0.3), (50, 0.2), (300, 0.02)])
def test_ancestral_sampler_is_the_lecture_s_loop(T: int, beta_end: float, dtype: torch.dtype, tolerance: float) -> None:
    model = DiffusionModel(
        network=Convolution(),
        schedule=LinearChain(T, 1e-4, beta_end),
        parameterization=EpsParameterization(),
        conditioning=TimeConditioning(),
        variance=FixedLargeVariance(),
        decoder=PlainGaussian(levels=256),
        clip_x0=False,
    )
    # a network without parameters runs in the images' precision
    x_T = start(3, dtype)
    images = AncestralSampler()(model, x_T, generators=torch.Generator().manual_seed(7))
    expected = lecture_loop(model.network, x_T, linear_betas(T, 1e-4, beta_end), torch.Generator().manual_seed(7))
    assert images.dtype == dtype
    scale = float(expected.abs().max())
    assert float((images - expected).abs().max()) <= tolerance * max(1.0, scale)


# --- the contract of all samplers


@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler(), DDIMSampler(1.0)])
@pytest.mark.parametrize("steps", [T, 5])
def test_an_image_does_not_depend_on_the_batch(sampler: Sampler, steps: int) -> None:
    model, x_T, grid = small_model(Elementwise(), clip_x0=True), start(6), strided_grid(chain_grid(T), steps)

    def run(order: list[int]) -> Tensor:
        return sampler(model, x_T[order], grid=grid, generators=image_generators(4, order))

    whole = run(list(range(6)))
    for order in ([5, 0, 3], [2], list(range(5, -1, -1))):
        assert torch.equal(run(order), whole[order])
    if sampler.__class__ is AncestralSampler:
        assert bool((sampler(model, x_T, grid=grid, generators=image_generators(5, range(6))) != whole).any())


@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler()])
@pytest.mark.parametrize("steps", [1, 2, 7, T])
def test_callback_sees_each_step(sampler: Sampler, steps: int) -> None:
    model, grid = small_model(Convolution(), clip_x0=True), strided_grid(chain_grid(T), steps)
    seen: list[tuple[Tensor, float]] = []
    images = sampler(
        model,
        start(2),
        grid=grid,
        generators=torch.Generator().manual_seed(0),
        callback=lambda x, s: seen.append((x, float(s))),
    )
    assert [s for _, s in seen] == grid.flip(0)[1:].tolist()
    assert torch.equal(seen[-1][0], images)


@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler()])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("steps", [1, 2, T])
def test_images_are_made_of_grey_levels(sampler: Sampler, large: bool, steps: int) -> None:
    """Also for a grid of one step, where the small variance of the decoder is 0."""
    model = DiffusionModel(
        network=Convolution(),
        schedule=CosineChain(T),
        parameterization=EpsParameterization(),
        conditioning=TimeConditioning(),
        variance=FixedLargeVariance() if large else FixedSmallVariance(),
        decoder=DiscretizedGaussian(levels=17),
    )
    x_T = start(4)
    before = x_T.clone()
    images = sampler(model, x_T, grid=strided_grid(chain_grid(T), steps), generators=torch.Generator().manual_seed(0))
    levels = (images + 1) * 8
    assert float((levels - levels.round()).abs().max()) < 1e-12
    assert float(images.abs().max()) <= 1
    assert torch.equal(x_T, before)


@pytest.mark.parametrize(
    "grid",
    [
        [0.0],
        [0.0, 0.5],
        [0.1, 1.0],
        [0.0, 0.5, 0.5, 1.0],
        [0.0, 0.7, 0.5, 1.0],
        [1.0, 0.0],
        [[0.0, 1.0]],
        [],
    ],
)
@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler()])
def test_grid_errors(sampler: Sampler, grid: list[float]) -> None:
    with pytest.raises(InputError, match="grid must increase from 0, the time of the data, to 1"):
        sampler(small_model(Convolution(), clip_x0=True), start(1), grid=torch.tensor(grid))


def test_the_default_grid_is_the_chain() -> None:
    model = small_model(Convolution(), clip_x0=False)
    assert torch.equal(model.grid, chain_grid(T))
    assert list(walk(AncestralSampler(), model, start(1))) == chain_grid(T).flip(0).tolist()
