"""The training objective and its times."""

import math
from collections import Counter

import pytest
import torch
from oracles import ScalarGaussianWorld, assert_mean, draw_data, linear_betas, oracle_model
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import NoiseMSE, StratifiedTimes, TimeSampler, UniformTimes
from ddpm_lightning.objectives.times import stratified_steps
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedLargeVariance,
    TimeConditioning,
)
from ddpm_lightning.schedules import BetaChain

T = 10
BETAS = linear_betas(T, 0.02, 0.4)
WORLD = ScalarGaussianWorld(0.3, 0.25, BETAS, "beta")
SAMPLERS: list[TimeSampler] = [UniformTimes(), StratifiedTimes()]


class Network(nn.Module):
    """Nonlinear in x and in t, elementwise."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x) + t.reshape(-1, 1, 1, 1)


def model(*, clip_x0: bool) -> DiffusionModel:
    return DiffusionModel(
        network=Network(),
        schedule=BetaChain(BETAS),
        parameterization=EpsParameterization(),
        conditioning=TimeConditioning(),
        variance=FixedLargeVariance(),
        decoder=DiscretizedGaussian(levels=256),
        clip_x0=clip_x0,
    )


def images(count: int) -> Tensor:
    return 2 * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64) - 1


# --- noise MSE


@pytest.mark.parametrize("clip_x0", [False, True])
def test_noise_mse_by_hand(clip_x0: bool) -> None:
    """|eps - eps_theta(sqrt(abar_i) x0 + sqrt(1 - abar_i) eps, i/T)|^2 / D, image by image; clipping plays no part."""
    x0 = images(4)
    loss = NoiseMSE(UniformTimes())(model(clip_x0=clip_x0), x0, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    steps = UniformTimes()(T, x0, generator).tolist()
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    expected = []
    for k, i in enumerate(steps):
        abar = WORLD.abar[i]
        x_t = math.sqrt(abar) * x0[k] + math.sqrt(1 - abar) * eps[k]
        guess = torch.sin(2 * x_t) + i / T
        expected.append(float((guess - eps[k]).square().mean()))
    assert loss.shape == (4,)
    assert loss.tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("times", SAMPLERS)
def test_noise_mse_of_the_optimal_denoiser(times: TimeSampler) -> None:
    """Its expectation is E Var(eps | x_t) = abar_t var / (abar_t var + 1 - abar_t), averaged over t."""
    abar = WORLD.abar[1:]
    expected = sum(a * WORLD.var / (a * WORLD.var + 1 - a) for a in abar) / T
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(500):
        x0 = draw_data(WORLD, (16, 1, 4, 4), generator)
        losses.append(NoiseMSE(times)(oracle_model(WORLD), x0, generator).mean())
    # one figure a batch: the losses of a stratified batch are not independent
    assert_mean(torch.stack(losses), expected, max_se=0.006)


def test_noise_mse_at_each_time() -> None:
    for i in (1, 4, 10):

        class Fixed(TimeSampler):
            def __call__(self, T: int, like: Tensor, generators: object = None, i: int = i) -> Tensor:
                return torch.full(like.shape[:1], i)

        abar = WORLD.abar[i]
        generator = torch.Generator().manual_seed(i)
        loss = NoiseMSE(Fixed())(oracle_model(WORLD), draw_data(WORLD, (3000, 1, 4, 4), generator), generator)
        assert_mean(loss, abar * WORLD.var / (abar * WORLD.var + 1 - abar), max_se=0.01)


def test_loss_of_an_image_does_not_depend_on_the_batch() -> None:
    objective, x0 = NoiseMSE(UniformTimes()), images(6)
    whole = objective(model(clip_x0=True), x0, image_generators(0, range(6)))
    for order in ([4, 1], [2]):
        assert torch.equal(objective(model(clip_x0=True), x0[order], image_generators(0, order)), whole[order])


# --- times


@pytest.mark.parametrize("times", SAMPLERS)
@pytest.mark.parametrize(("steps", "batch"), [(1, 3), (7, 3), (10, 16), (7, 7)])
def test_each_time_is_uniform(times: TimeSampler, steps: int, batch: int) -> None:
    """Every image's own step is uniform over 1..T, ends included, whatever its place in the batch."""
    generator, like = torch.Generator().manual_seed(0), torch.zeros(batch, 1, 1, 1)
    draws = torch.stack([times(steps, like, generator) for _ in range(3000)])
    assert draws.dtype == torch.int64 and draws.shape == (3000, batch)
    assert set(draws.flatten().tolist()) == set(range(1, steps + 1))
    for place in {0, batch // 2, batch - 1}:
        for i in range(1, steps + 1):
            assert_mean((draws[:, place] == i).double(), 1 / steps, max_se=0.01)


@pytest.mark.parametrize(("steps", "batch"), [(10, 10), (10, 20), (100, 5), (7, 3)])
def test_stratified_times_cover_the_chain(steps: int, batch: int) -> None:
    generator, like = torch.Generator().manual_seed(0), torch.zeros(batch, 1, 1, 1)
    orders = set()
    for _ in range(50):
        draws = StratifiedTimes()(steps, like, generator).tolist()
        for k, i in enumerate(sorted(draws)):
            # the k-th smallest lies in the k-th of B equal parts of (0, T]
            assert math.floor(k * steps / batch) + 1 <= i <= math.ceil((k + 1) * steps / batch)
        if steps % batch == 0 or batch % steps == 0:
            parts = Counter((i - 1) * batch // steps if batch < steps else i for i in draws)
            assert set(parts.values()) == {max(1, batch // steps)}
        orders.add(tuple(draws))
    assert len(orders) > 25


def test_uniform_times_are_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([UniformTimes()(5, torch.zeros(2, 1, 1, 1), generator) for _ in range(5000)]).double()
    assert_mean((draws[:, 0] - 3) * (draws[:, 1] - 3), 0.0, max_se=0.05)


# --- the steps of an estimator


@pytest.mark.parametrize(("count", "steps"), [(19, 3), (19, 1), (8, 4), (8, 5), (8, 7)])
def test_stratified_steps_estimate_any_sum(count: int, steps: int) -> None:
    like = torch.zeros(8000, 1, 1, 1)
    indices, weights = stratified_steps(count, steps, like, torch.Generator().manual_seed(0))
    assert indices.shape == (steps, 8000) and indices.dtype == torch.int64
    assert weights.shape == (steps,) and weights.dtype == torch.float64
    assert float(weights.sum()) == count
    assert float(weights.max() - weights.min()) <= 1
    assert bool((indices.diff(dim=0) > 0).all())
    for i in range(1, count + 1):
        # the weighted number of times that i is taken is 1 on average
        assert_mean(((indices == i).double() * weights[:, None]).sum(0), 1.0, max_se=0.06)


def test_all_steps_draw_nothing() -> None:
    for steps in (None, 5, 6, 100):
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        indices, weights = stratified_steps(5, steps, torch.zeros(3, 1, 1, 1), generator)
        assert indices.tolist() == [[i] * 3 for i in range(1, 6)]
        assert weights.tolist() == [1.0] * 5
        assert torch.equal(generator.get_state(), before)
    indices, weights = stratified_steps(0, None, torch.zeros(3, 1, 1, 1))
    assert indices.shape == (0, 3) and weights.shape == (0,)


def test_stratified_steps_of_an_image_do_not_depend_on_the_batch() -> None:
    whole, _ = stratified_steps(30, 4, torch.zeros(5, 1, 1, 1), image_generators(0, range(5)))
    part, _ = stratified_steps(30, 4, torch.zeros(2, 1, 1, 1), image_generators(0, [3, 0]))
    assert torch.equal(part, whole[:, [3, 0]])
    assert len(set(map(tuple, whole.T.tolist()))) > 1


@pytest.mark.parametrize("steps", [0, -1])
def test_stratified_steps_errors(steps: int) -> None:
    with pytest.raises(InputError, match=f"steps = {steps} must be 1 or more"):
        stratified_steps(5, steps, torch.zeros(3, 1, 1, 1))
