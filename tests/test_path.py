"""Log probabilities along a path and the bounds of single states, against a world in which they are known exactly."""

import math

import pytest
import torch
from oracles import (
    ScalarGaussianWorld,
    assert_mean,
    draw_data,
    linear_betas,
    marginal_moments,
    model_moments,
    normal_log_prob,
    oracle_model,
    reverse_map,
    state_bound_mean,
)
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import ElboEstimator, PathLogProbs, TrajectoryElbo, path_log_probs, state_bound
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedLargeVariance,
    GammaConditioning,
)
from ddpm_lightning.schedules import CosineChain, LinearGamma, Schedule

DIMS = 16
CHAINS = {1: [0.3], 2: [0.2, 0.5], 10: linear_betas(10, 0.02, 0.4)}
WORLDS = {
    f"T={T}, {variance}": ScalarGaussianWorld(0.3, 0.25, CHAINS[T], variance)
    for T in CHAINS
    for variance in ("beta", "posterior")
    if (T, variance) != (1, "posterior")
}
TEN = WORLDS["T=10, posterior"]


class Wrong(nn.Module):
    """A bad, nonlinear, elementwise denoiser that looks at its noise level and its label."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        shift = 0.4 * t if label is None else 0.4 * t + label
        return 1.3 * torch.tanh(x) + shift.reshape(-1, 1, 1, 1)


def wrong_model(schedule: Schedule) -> DiffusionModel:
    return DiffusionModel(
        Wrong(), schedule, EpsParameterization(), GammaConditioning(), FixedLargeVariance(), DiscretizedGaussian(17)
    )


def grey_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randint(17, (count, 1, 4, 4), generator=generator).double() / 16 - 1


def trajectory(model: DiffusionModel, x0: Tensor, seed: int, form: ElboEstimator, **cond: Tensor) -> Tensor:
    return form(model, x0, torch.Generator().manual_seed(seed), **cond).total


# --- one path


@pytest.mark.parametrize("name", WORLDS)
def test_every_column_is_exact_in_expectation(name: str) -> None:
    world = WORLDS[name]
    generator = torch.Generator().manual_seed(0)
    path = path_log_probs(oracle_model(world), draw_data(world, (2000, 1, 4, 4), generator), generator)
    assert path.log_q_marginal.shape == path.log_q_step.shape == path.log_p_step.shape == (2000, world.T)
    assert_mean(path.log_p_data / DIMS, world.terms()["reconstruction"], max_se=0.01)
    for t in range(1, world.T + 1):
        entropies = {"log_q_marginal": 1 - world.abar[t], "log_q_step": world.betas[t - 1]}
        for attribute, var in entropies.items():
            column = getattr(path, attribute)[:, t - 1]
            assert_mean(column / DIMS, -0.5 * (math.log(2 * math.pi * var) + 1), max_se=0.01)
        mean, var = marginal_moments(world, t)
        if t == world.T:
            expected = -0.5 * (math.log(2 * math.pi) + mean**2 + var)
        else:
            after_mean, after_var = marginal_moments(world, t + 1)
            gain, offset = reverse_map(world, t + 1)
            square = (mean - gain * after_mean - offset) ** 2
            square += var - 2 * gain * math.sqrt(1 - world.betas[t]) * var + gain**2 * after_var
            reverse_var = world.reverse_var(t + 1)
            expected = -0.5 * (math.log(2 * math.pi * reverse_var) + square / reverse_var)
        assert_mean(path.log_p_step[:, t - 1] / DIMS, expected, max_se=0.02 * max(1.0, abs(expected)))


@pytest.mark.parametrize("schedule", [CosineChain(1), CosineChain(12), LinearGamma(-6.0, 4.0, T=9)])
def test_path_has_the_trajectory_forms_total(schedule: Schedule) -> None:
    x0, model = grey_images(8), wrong_model(schedule)
    path = path_log_probs(model, x0, torch.Generator().manual_seed(5))
    torch.testing.assert_close(path.elbo, trajectory(model, x0, 5, TrajectoryElbo()), rtol=1e-12, atol=1e-9)
    assert not torch.allclose(path.elbo, trajectory(model, x0, 6, TrajectoryElbo()))
    assert torch.equal(path.times, model.grid[1:]) and torch.equal(path.gamma, schedule.gamma(model.grid[1:]))


def test_path_of_another_number_of_states_and_of_a_class() -> None:
    x0, model, label = grey_images(8), wrong_model(CosineChain(12)), torch.arange(8) % 3
    path = path_log_probs(model.with_steps(5), x0, torch.Generator().manual_seed(5), label=label)
    assert path.log_p_step.shape == (8, 5)
    expected = trajectory(model, x0, 5, TrajectoryElbo(T=5), label=label)
    torch.testing.assert_close(path.elbo, expected, rtol=1e-12, atol=1e-9)


def test_path_of_an_image_does_not_depend_on_the_batch() -> None:
    images, model = grey_images(8), wrong_model(CosineChain(12))

    def run(order: list[int]) -> PathLogProbs:
        return path_log_probs(model, images[order], image_generators(11, order))

    whole, part = run(list(range(8))), run([5, 2, 7])
    for name in ("log_q_marginal", "log_q_step", "log_p_step", "log_p_data", "elbo"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[5, 2, 7]]), name


# --- the bound of one state


def test_oracle_of_states_is_consistent() -> None:
    """Averaged over the data it is the bound; it never exceeds the model's log p; and it grows tight with T."""
    for world in WORLDS.values():
        # a quadratic in x, so its mean over N(m, v) follows from three values
        low, middle, high = (state_bound_mean(world, 0, world.mean + d) for d in (-1, 0, 1))
        averaged = middle + 0.5 * (low + high - 2 * middle) * world.var
        assert averaged == pytest.approx(world.terms()["denoising_form"]["elbo"], abs=1e-10)
        for n in range(world.T + 1):
            for x in (-1.5, 0.2, 1.0):
                gap = normal_log_prob(x, *model_moments(world, n)) - state_bound_mean(world, n, x)
                assert gap >= -1e-12 and (n < world.T or gap == pytest.approx(0, abs=1e-12))
    gaps = []
    for T in (100, 1000):
        world = ScalarGaussianWorld(0.3, 0.25, linear_betas(T, 0.1 / T, 20 / T), "beta")
        n = T // 10
        exact = normal_log_prob(0.4, *marginal_moments(world, n))
        assert normal_log_prob(0.4, *model_moments(world, n)) == pytest.approx(exact, abs=5 / T)
        gaps.append(exact - state_bound_mean(world, n, 0.4))
    # of first order in 1/T
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=0.05) and 0 < gaps[1] < 3e-3, gaps


@pytest.mark.parametrize("x", [-1.2, 0.5])
@pytest.mark.parametrize("name", WORLDS)
def test_bound_of_a_state_is_exact(name: str, x: float) -> None:
    world = WORLDS[name]
    model = oracle_model(world)
    for n in sorted({0, 1, min(2, world.T), world.T - 1, world.T}):
        state = torch.full((1500, 1, 4, 4), x, dtype=torch.float64)
        bound = state_bound(model, state, n, torch.Generator().manual_seed(n))
        assert bound.shape == (1, 1500)
        assert_mean(bound / DIMS, state_bound_mean(world, n, x), max_se=0.03)


@pytest.mark.parametrize("n", [0, 10, 50])
def test_bound_of_a_state_is_nearly_its_log_density_on_a_long_chain(n: int) -> None:
    world = ScalarGaussianWorld(0.3, 0.25, linear_betas(100, 1e-3, 0.2), "beta")
    mean, var = marginal_moments(world, n)
    x = mean + math.sqrt(var) * torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    bound = state_bound(oracle_model(world), x, n, torch.Generator().manual_seed(2), paths=2).mean(0) / DIMS
    exact = (-0.5 * (math.log(2 * math.pi * var) + (x - mean).square() / var)).flatten(1).mean(1)
    gap = exact - bound
    se = float(gap.std()) / math.sqrt(len(gap))
    assert -4 * se < float(gap.mean()) < 0.02 + 4 * se and se < 0.005


def test_bound_of_data_is_the_trajectory_form() -> None:
    x0, model = grey_images(8), wrong_model(CosineChain(12))
    bounds = state_bound(model, x0, 0, torch.Generator().manual_seed(3), paths=3, label=torch.ones(8))
    expected = trajectory(model, x0, 3, TrajectoryElbo(), label=torch.ones(8))
    torch.testing.assert_close(bounds[0], expected, rtol=1e-12, atol=1e-9)
    assert bounds.shape == (3, 8) and not torch.allclose(bounds[0], bounds[1])


@pytest.mark.parametrize(("index", "paths", "word"), [(-1, 1, "index"), (11, 1, "index"), (3, 0, "paths")])
def test_states_off_the_chain(index: int, paths: int, word: str) -> None:
    with pytest.raises(InputError, match=word):
        state_bound(oracle_model(TEN), torch.zeros(2, 1, 4, 4).double(), index, torch.Generator(), paths=paths)
