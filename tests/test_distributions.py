"""The diagonal Gaussian against torch.distributions, for every shape of log_var that the package uses."""

import math

import pytest
import torch
from oracles import assert_moments
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from ddpm_lightning.distributions import DiagonalGaussian, centred_like
from ddpm_lightning.ops import image_generators

SHAPE = (4, 4, 4, 4)
LOG_VAR_SHAPES = [(4, 1, 1, 1), (1, 1, 1, 1), SHAPE]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(gaussian: DiagonalGaussian) -> Independent:
    std = torch.exp(0.5 * gaussian.log_var).expand_as(gaussian.mean)
    return Independent(Normal(gaussian.mean, std), 3)


@pytest.mark.parametrize("shape", LOG_VAR_SHAPES)
def test_log_prob_and_entropy(shape: tuple[int, ...]) -> None:
    gaussian = DiagonalGaussian(normal(SHAPE, 0), normal(shape, 1))
    x = normal(SHAPE, 2)
    assert gaussian.log_prob(x).shape == (4,)
    torch.testing.assert_close(gaussian.log_prob(x), reference(gaussian).log_prob(x), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(gaussian.entropy(), reference(gaussian).entropy(), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("shape_q", LOG_VAR_SHAPES)
@pytest.mark.parametrize("shape_p", LOG_VAR_SHAPES)
def test_kl(shape_p: tuple[int, ...], shape_q: tuple[int, ...]) -> None:
    p = DiagonalGaussian(normal(SHAPE, 0), normal(shape_p, 1))
    q = DiagonalGaussian(normal(SHAPE, 2), normal(shape_q, 3))
    expected = kl_divergence(reference(p), reference(q))
    assert p.kl(q).shape == (4,)
    torch.testing.assert_close(p.kl(q), expected, rtol=1e-12, atol=1e-10)
    assert bool((p.kl(p) == 0).all())


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-8, 1e-10])
def test_kl_of_nearly_equal_variances(gap: float) -> None:
    mean = normal(SHAPE, 0)
    log_var = torch.full((1, 1, 1, 1), -0.125, dtype=torch.float64)
    p, q = DiagonalGaussian(mean, log_var + gap), DiagonalGaussian(mean, log_var)
    d = float(p.log_var - q.log_var)
    expected = 64 * 0.5 * (d**2 / 2 + d**3 / 6 + d**4 / 24)
    assert p.kl(q).tolist() == pytest.approx([expected] * 4, rel=1e-5, abs=0)


def test_float32_images_keep_a_float64_variance() -> None:
    mean, x = normal(SHAPE, 0).float(), normal(SHAPE, 2).float()
    gaussian = DiagonalGaussian(mean, torch.full((4, 1, 1, 1), -9.0, dtype=torch.float64))
    value = gaussian.log_prob(x)
    assert value.dtype == torch.float64 and gaussian.std.dtype == torch.float32
    exact = DiagonalGaussian(mean.double(), gaussian.log_var)
    torch.testing.assert_close(value, exact.log_prob(x.double()), rtol=1e-5, atol=0)
    assert gaussian.kl(centred_like(x, torch.zeros(()))).dtype == torch.float64
    assert gaussian.entropy().dtype == torch.float64


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (1, 1, 1, 1), (4, 1, 90, 90)])
def test_sample_moments(shape: tuple[int, ...]) -> None:
    log_var = normal((*shape[:2], 1, 1), 1).expand(shape)
    mean = expand_rows([0.0, 1.0, -2.0, 30.0], (4, 1, 90, 90))
    samples = DiagonalGaussian(mean, log_var).sample(torch.Generator().manual_seed(3))
    for k in range(4):
        var = math.exp(float(log_var[k % len(log_var)].flatten()[0]))
        assert_moments(samples[k], float(mean[k, 0, 0, 0]), var)


def expand_rows(values: list[float], shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1).expand(shape)


def test_sample_of_an_image_does_not_depend_on_the_batch() -> None:
    gaussian = DiagonalGaussian(normal(SHAPE, 0), normal((4, 1, 1, 1), 1))
    whole = gaussian.sample(image_generators(0, range(4)))
    part = DiagonalGaussian(gaussian.mean[[3, 1]], gaussian.log_var[[3, 1]]).sample(image_generators(0, [3, 1]))
    assert torch.equal(part, whole[[3, 1]])


def test_zero_variance_is_the_mean() -> None:
    mean = normal(SHAPE, 0)
    point = DiagonalGaussian(mean, torch.full((4, 1, 1, 1), -torch.inf, dtype=torch.float64))
    assert torch.equal(point.sample(torch.Generator().manual_seed(0)), mean)


def test_centred_like() -> None:
    x = normal(SHAPE, 0)
    expected = Independent(Normal(torch.zeros_like(x), torch.full_like(x, 3.0)), 3).log_prob(x)
    log_var = torch.tensor(9.0, dtype=torch.float64).log()
    torch.testing.assert_close(centred_like(x, log_var).log_prob(x), expected, rtol=1e-12, atol=1e-10)
