"""Samplers in worlds of many dimensions and of many modes: what they draw is what they should, at every state."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from oracles import assert_covariance
from torch import Tensor
from worlds_cases import COARSE, CORRELATED, IMAGES, PIXELS, VARIANCES
from worlds_chain import World, chain_of, optimal_model, preserving

from ddpm_lightning.process import ReverseVariance
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, Sampler
from ddpm_lightning.schedules import LinearGamma, Schedule

FINE = LinearGamma(-9.0, 9.0, T=400)


def states_of(
    sampler: Sampler,
    world: World,
    schedule: Schedule,
    shape: tuple[int, ...],
    variance: ReverseVariance | None = None,
    x_T: Tensor | None = None,
) -> list[Tensor]:
    """Events of x_T, ..., x_1 and of the image, ``[N, dims]`` each."""
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(shape, generator=generator, dtype=torch.float64) if x_T is None else x_T
    states = [x_T]
    sampler(
        optimal_model(world, schedule, variance=variance),
        x_T,
        generators=generator,
        callback=lambda x, s: states.append(x.clone()),
    )
    return [state.reshape(-1, world.dims) for state in states]


# --- coarse grids: the discrete chain's own output, exactly


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", COARSE)
def test_ancestral_covariance_at_every_state(schedule: str, variance: str) -> None:
    schedule_, gammas = COARSE[schedule]
    expected = CORRELATED.ancestral_moments(chain_of(gammas), variance)
    states = states_of(AncestralSampler(), CORRELATED, schedule_, (30_000, 1, 2, 2), VARIANCES[variance])
    for state, (mean, cov) in zip(states, expected, strict=True):
        assert_covariance(state, mean, cov)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", COARSE)
def test_ddim_covariance_at_every_state(schedule: str, eta: float) -> None:
    schedule_, gammas = COARSE[schedule]
    chain = chain_of(gammas)
    expected = CORRELATED.ddim_moments(chain, eta)
    states = states_of(DDIMSampler(eta), CORRELATED, schedule_, (30_000, 1, 2, 2))
    for state, (mean, cov) in zip(states, expected, strict=True):
        assert_covariance(state, mean, cov)
    if eta == 1:
        small = CORRELATED.ancestral_moments(chain, "posterior")
        for (mean, cov), (other_mean, other_cov) in zip(expected, small, strict=True):
            torch.testing.assert_close(mean, other_mean)
            torch.testing.assert_close(cov, other_cov)


# --- fine grids: the data's distribution


def distance(moments: tuple[Tensor, Tensor]) -> float:
    """Largest error of the mean and of the covariance of images."""
    mean, cov = moments
    return max(float((mean - CORRELATED.mean).abs().max()), float((cov - CORRELATED.cov).abs().max()))


@pytest.mark.parametrize("kind", ["beta", "posterior", "ddim"])
def test_images_approach_the_data_in_first_order(kind: str) -> None:
    """Exact moments, no sampling: halving the step halves the error, and both ends cost less than 1e-5."""
    errors = []
    for T in (101, 201, 401):
        chain = chain_of([-14 + 28 * i / (T - 1) for i in range(T)])
        moments = CORRELATED.ddim_moments(chain, 0.0) if kind == "ddim" else CORRELATED.ancestral_moments(chain, kind)
        errors.append(distance(moments[-1]))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < 0.03 and all(0.9 < order < 1.1 for order in orders), (errors, orders)


@cache
def ancestral_states(variance: str) -> list[Tensor]:
    """Every 40th state of the mixture of pixels."""
    return states_of(AncestralSampler(), PIXELS, FINE, (1250, 1, 4, 4), VARIANCES[variance])[::40]


@pytest.mark.parametrize("variance", VARIANCES)
def test_ancestral_states_of_a_mixture_have_its_marginals(variance: str) -> None:
    """Every 40th state is distributed as q(x_t), by Kolmogorov's distance; one event in 16,000 exceeds 2.3 / sqrt(N)
    by chance. The allowance of 0.006 is for 400 steps."""
    for i, state in enumerate(ancestral_states(variance)):
        alpha, sigma2 = preserving(FINE.gamma(FINE.grid().flip(0)[40 * i]))
        x = state.flatten().sort().values
        rank = torch.arange(1, len(x) + 1, dtype=torch.float64) / len(x)
        kolmogorov = float((PIXELS.cdf(x, alpha, sigma2) - rank).abs().max())
        assert kolmogorov < 2.3 / math.sqrt(len(x)) + 0.006, (40 * i, kolmogorov)


@cache
def truth_of(world: World) -> Tensor:
    return world.sample(400_000, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler(), DDIMSampler(0.7)])
@pytest.mark.parametrize("name", ["pixels", "images"])
def test_images_of_a_mixture_have_its_weights_and_moments(name: str, sampler: Sampler) -> None:
    """Weights, means and standard deviations of the modes, within 4 standard errors and an allowance of 0.01."""
    world, shape = (PIXELS, (1250, 1, 4, 4)) if name == "pixels" else (IMAGES, (8000, 1, 2, 2))
    drawn_already = name == "pixels" and isinstance(sampler, AncestralSampler)
    images = ancestral_states("beta")[-1] if drawn_already else states_of(sampler, world, FINE, shape)[-1]
    truth = truth_of(world)

    def modes(x: Tensor) -> Tensor:
        """The mode that each event is most likely from."""
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        return world.responsibilities(x, one, zero).argmax(-1)

    ours, theirs = modes(images), modes(truth)
    for k in range(len(world.weights)):
        share, expected = float((ours == k).double().mean()), float((theirs == k).double().mean())
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(images)) + 0.01
        x, y = images[ours == k], truth[theirs == k]
        std = y.std(0)
        assert bool(((x.mean(0) - y.mean(0)).abs() < 4 * std / math.sqrt(len(x)) + 0.01).all())
        assert bool(((x.std(0) - std).abs() < 4 * std / math.sqrt(2 * len(x)) + 0.01).all())


def test_deterministic_ddim_is_the_quantile_map() -> None:
    """In one dimension the flow is monotone, so it takes each quantile of N(0, 1) to that of the data: no randomness,
    and the error halves with the step."""
    z = torch.linspace(-2.5, 2.5, 64, dtype=torch.float64)
    expected = PIXELS.quantile(torch.special.ndtr(z))
    errors = []
    for T in (201, 401, 801):
        schedule = LinearGamma(-13.0, 14.0, T=T)
        images = states_of(DDIMSampler(), PIXELS, schedule, (), x_T=z.reshape(4, 1, 4, 4))[-1].flatten()
        assert bool((images.diff() > 0).all())
        errors.append(float((images - expected).abs().mean()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < 0.01 and all(0.9 < order < 1.1 for order in orders), (errors, orders)
