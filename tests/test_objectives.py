"""The mean squared errors, and the steps of an estimator."""

import math

import pytest
import torch
from oracles import ScalarGaussianWorld, assert_mean, draw_data, linear_betas, oracle_model
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import (
    EquispacedTimes,
    ImportanceTimes,
    MinSNRWeighting,
    NoiseMSE,
    P2Weighting,
    StratifiedTimes,
    TimeDraw,
    TimeSampler,
    UniformTimes,
    WeightedMSE,
)
from ddpm_lightning.objectives.times import steps_of, stratified_steps
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedLargeVariance,
    Parameterization,
    ScoreParameterization,
    TimeConditioning,
    VParameterization,
    X0Parameterization,
)
from ddpm_lightning.schedules import BetaChain

T = 10
BETAS = linear_betas(T, 0.02, 0.4)
WORLD = ScalarGaussianWorld(0.3, 0.25, BETAS, "beta")
SAMPLERS: list[TimeSampler] = [UniformTimes(), StratifiedTimes(), EquispacedTimes(), ImportanceTimes(bins=5)]


class Network(nn.Module):
    """Nonlinear in x and in t, elementwise."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x) + t.reshape(-1, 1, 1, 1)


def model(*, clip_x0: bool = False, parameterization: Parameterization | None = None) -> DiffusionModel:
    return DiffusionModel(
        network=Network(),
        schedule=BetaChain(BETAS),
        parameterization=parameterization or EpsParameterization(),
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
    steps = steps_of(UniformTimes()(x0, generator), T).tolist()
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
        abar = WORLD.abar[i]
        generator = torch.Generator().manual_seed(i)
        loss = NoiseMSE(Fixed((i - 0.5) / T))(
            oracle_model(WORLD), draw_data(WORLD, (3000, 1, 4, 4), generator), generator
        )
        assert_mean(loss, abar * WORLD.var / (abar * WORLD.var + 1 - abar), max_se=0.01)


def test_loss_of_an_image_does_not_depend_on_the_batch() -> None:
    objective, x0 = NoiseMSE(UniformTimes()), images(6)
    whole = objective(model(clip_x0=True), x0, image_generators(0, range(6)))
    for order in ([4, 1], [2]):
        assert torch.equal(objective(model(clip_x0=True), x0[order], image_generators(0, order)), whole[order])


# --- weighted MSE


class Fixed(TimeSampler):
    """Always the same position and weight; remembers what it is told and given."""

    def __init__(self, position: float, weight: float = 1.0) -> None:
        super().__init__()
        self.position, self.weight = position, weight
        self.told: list[tuple[Tensor, Tensor]] = []

    def forward(self, like: Tensor, generators: object = None) -> TimeDraw:
        values = torch.ones(len(like), dtype=torch.float64)
        return TimeDraw(self.position * values, self.weight * values)

    def update(self, position: Tensor, loss: Tensor) -> None:
        self.told.append((position, loss))


def error_factor(target: Parameterization, abar: float) -> float:
    """By hand: squared error of the target over that of eps."""
    alpha2, sigma2 = abar, 1 - abar
    return {
        EpsParameterization: 1.0,
        X0Parameterization: sigma2 / alpha2,
        VParameterization: 1 / alpha2,
        ScoreParameterization: 1 / sigma2,
    }[type(target)]


@pytest.mark.parametrize("output", [EpsParameterization(), X0Parameterization(), VParameterization()])
@pytest.mark.parametrize(
    "target", [EpsParameterization(), X0Parameterization(), VParameterization(), ScoreParameterization()]
)
def test_targets_are_equivalent_up_to_known_weights(target: Parameterization, output: Parameterization) -> None:
    x0, network = images(3), model(parameterization=output)
    for i in (1, 4, 10):
        times = Fixed((i - 0.5) / T)
        of_eps = NoiseMSE(times)(network, x0, torch.Generator().manual_seed(i))
        loss = WeightedMSE(times, target=target)(network, x0, torch.Generator().manual_seed(i))
        assert torch.allclose(loss, error_factor(target, WORLD.abar[i]) * of_eps, rtol=1e-9)


def test_weightings_multiply_the_error_of_eps() -> None:
    """min-SNR as its authors write it, a clipped SNR on the error of x0; P2 at k = 2, power = 1/2."""
    x0 = images(3)
    for i in (1, 5, 10):
        times, snr = Fixed((i - 0.5) / T), WORLD.abar[i] / (1 - WORLD.abar[i])
        losses = [
            WeightedMSE(times, target, weighting)(model(), x0, torch.Generator().manual_seed(i))
            for target, weighting in (
                (None, None),
                (X0Parameterization(), None),
                (None, MinSNRWeighting(clip=3.0)),
                (None, P2Weighting(k=2.0, power=0.5)),
            )
        ]
        assert torch.allclose(losses[2], min(snr, 3.0) * losses[1], rtol=1e-9)
        assert torch.allclose(losses[3], losses[0] / math.sqrt(2 + snr), rtol=1e-9)


def test_continuous_time_by_hand() -> None:
    """Position u is t = 1/T + (1 - 1/T) u; log alpha-bar is linear between states; the loss is an integral over t."""
    x0 = images(3)
    for position in (0.0, 0.5, 0.99):
        objective = WeightedMSE(Fixed(position), continuous=True)
        loss = objective(model(), x0, torch.Generator().manual_seed(3))
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        t = 1 / T + (1 - 1 / T) * position
        state, fraction = int(t * T), t * T - int(t * T)
        abar = WORLD.abar[state] ** (1 - fraction) * WORLD.abar[state + 1] ** fraction
        x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps
        expected = 0.9 * (torch.sin(2 * x_t) + t - eps).square().flatten(1).mean(1)
        assert torch.allclose(loss, expected, rtol=1e-9)


def test_the_sampler_hears_of_weighted_losses_without_its_own_weight() -> None:
    times = Fixed(0.55, weight=3.0)
    objective = WeightedMSE(times, weighting=MinSNRWeighting(clip=0.1))
    plain = WeightedMSE(Fixed(0.55), weighting=MinSNRWeighting(clip=0.1))
    loss = objective(model(), images(3), torch.Generator().manual_seed(1))
    assert torch.equal(loss, 3 * plain(model(), images(3), torch.Generator().manual_seed(1)))
    ((position, told),) = times.told
    assert torch.equal(3 * told, loss) and not told.requires_grad and position.tolist() == [0.55] * 3
    objective.eval()(model(), images(3), torch.Generator().manual_seed(1))
    assert len(times.told) == 1


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
