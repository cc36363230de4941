"""Decoders: probabilities that add up to one, tails that do not break, and draws that follow them."""

import math

import numpy as np
import pytest
import torch
from oracles import assert_mean
from scipy.stats import norm
from torch import Tensor
from torch.distributions import Normal

from ddpm_lightning.distributions import DiagonalGaussian
from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    CategoricalDecoder,
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedSmallVariance,
    GammaConditioning,
    PlainGaussian,
)
from ddpm_lightning.schedules import LinearGamma

LEVELS = (2, 3, 17, 256)
VARIANCES = (1e-6, 1e-4, 1e-2, 0.1, 1.0, 100.0, 1e4)


def grey(levels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.arange(levels, dtype=dtype) / (levels - 1) - 1


def means(dtype: torch.dtype = torch.float64) -> Tensor:
    inside = 2 * torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    outside = torch.tensor([-1.0, 0.0, 1.0, 1.001, -1.001, 1.5, -3.0, 10.0, -50.0, 1e3, -1e3], dtype=torch.float64)
    return torch.cat([inside, outside]).to(dtype)


def table(levels: int, var: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """log P for each mean and level, ``[means, levels]``."""
    mean = means(dtype)
    x0 = grey(levels, dtype).reshape(1, 1, 1, -1).expand(len(mean), 1, 1, -1)
    gaussian = DiagonalGaussian(
        mean.reshape(-1, 1, 1, 1).expand_as(x0), torch.full((len(mean), 1, 1, 1), var, dtype=torch.float64).log()
    )
    return DiscretizedGaussian(levels=levels).level_log_prob(x0, gaussian)[:, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("levels", LEVELS)
def test_probabilities_sum_to_one(levels: int, var: float, dtype: torch.dtype) -> None:
    """Trap 14, and never nan or above certainty, for means in and far outside the range."""
    log_prob = table(levels, var, dtype)
    assert log_prob.dtype == torch.float64
    assert not bool(log_prob.isnan().any())
    assert bool(log_prob.isfinite().all())
    assert float(log_prob.max()) <= 1e-15
    assert (log_prob.exp().sum(1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("var", [1e-4, 1e-2, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("levels", LEVELS)
def test_against_differences_of_cdfs(levels: int, var: float) -> None:
    log_prob, x, half = table(levels, var).numpy(), grey(levels).numpy(), 1 / (levels - 1)
    std = math.sqrt(var)
    for row, mean in zip(log_prob, means().tolist(), strict=True):
        upper = np.where(np.arange(levels) == levels - 1, np.inf, (x + half - mean) / std)
        lower = np.where(np.arange(levels) == 0, -np.inf, (x - half - mean) / std)
        # in the left tail cdf differences keep their precision, in the right tail survival differences do
        expected = np.where(lower > 0, norm.sf(lower) - norm.sf(upper), norm.cdf(upper) - norm.cdf(lower))
        known = expected > 1e-250
        np.testing.assert_allclose(row[known], np.log(expected[known]), rtol=1e-8, atol=1e-8)
        assert bool((row[~known] < -500).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_tails_are_not_capped(dtype: torch.dtype) -> None:
    """log P of the level k bins away falls as the square of the distance, far below what exp can hold."""
    log_prob = table(256, 1e-6, dtype)
    inside = log_prob[:40]
    assert float(inside.min(dim=1).values.max()) < -1000
    mean = means(dtype)[0].item()
    distance = mean - grey(256)[100:105] - math.copysign(1 / 255, mean - float(grey(256)[100]))
    leading = -(distance**2) / 2e-6
    torch.testing.assert_close(log_prob[0, 100:105], leading, rtol=1e-3, atol=0)
    for var in (1e-4, 1e-6):
        assert float(table(256, var, dtype).min()) < -1e9
    # a mean far outside still ranks the levels by their distance
    assert bool((table(17, 1e-2, dtype)[-2].diff() > 0).all())
    assert bool((table(17, 1e-2, dtype)[-1].diff() < 0).all())


def test_huge_variance_leaves_half_at_each_end() -> None:
    for levels in (17, 256):
        log_prob = table(levels, 1e12)[:40]
        torch.testing.assert_close(log_prob[:, [0, -1]].exp(), torch.full((40, 2), 0.5).double(), rtol=1e-5, atol=0)
        inner = 2 / (levels - 1) / math.sqrt(2 * math.pi * 1e12)
        torch.testing.assert_close(
            log_prob[:, 1:-1].exp(), torch.full((40, levels - 2), inner).double(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("levels", LEVELS)
def test_gradients_are_finite(levels: int, var: float) -> None:
    mean = means().reshape(-1, 1, 1, 1).requires_grad_()
    log_var = torch.full((len(mean), 1, 1, 1), math.log(var), dtype=torch.float64).requires_grad_()
    x0 = grey(levels).reshape(1, 1, 1, -1).expand(len(mean), 1, 1, -1)
    DiscretizedGaussian(levels=levels).log_prob(x0, DiagonalGaussian(mean.expand_as(x0), log_var)).sum().backward()
    assert mean.grad is not None and log_var.grad is not None
    assert bool(mean.grad.isfinite().all()) and bool(log_var.grad.isfinite().all())
    assert bool((mean.grad != 0).any())


def test_log_prob_sums_over_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = grey(17)[torch.randint(17, (4, 4, 4, 4), generator=generator)]
    mean = torch.randn(4, 4, 4, 4, generator=generator, dtype=torch.float64)
    log_var = torch.tensor([-3.0, -1.0, 0.0, 2.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    decoder = DiscretizedGaussian(levels=17)
    log_prob = decoder.log_prob(x0, DiagonalGaussian(mean, log_var))
    assert log_prob.shape == (4,)
    for k in range(4):
        pixels = decoder.level_log_prob(x0[k : k + 1], DiagonalGaussian(mean[k : k + 1], log_var[k : k + 1]))
        assert float(log_prob[k]) == pytest.approx(float(pixels.sum()), rel=1e-12)


@pytest.mark.parametrize(("mean", "var"), [(0.1, 0.05), (-0.98, 0.01), (1.7, 1.0), (0.0, 100.0)])
def test_samples_follow_the_probabilities(mean: float, var: float) -> None:
    decoder, n = DiscretizedGaussian(levels=17), 40_000
    gaussian = DiagonalGaussian(
        torch.full((n, 1, 1, 1), mean, dtype=torch.float64), torch.full((1, 1, 1, 1), var, dtype=torch.float64).log()
    )
    samples = decoder.sample(gaussian, torch.Generator().manual_seed(0)).flatten()
    levels = grey(17)
    assert float((samples[:, None] - levels).abs().min(dim=1).values.max()) < 1e-12
    one = DiagonalGaussian(torch.full((1, 1, 1, 17), mean, dtype=torch.float64), gaussian.log_var)
    probabilities = decoder.level_log_prob(levels.reshape(1, 1, 1, 17), one).exp().flatten().tolist()
    tested = 0
    for level, probability in zip(levels.tolist(), probabilities, strict=True):
        if probability * n > 20:
            assert_mean(((samples - level).abs() < 1e-9).double(), probability, max_se=0.003)
            tested += 1
    assert tested >= 4


def test_sample_of_an_image_does_not_depend_on_the_batch() -> None:
    gaussian = DiagonalGaussian(torch.zeros(4, 1, 3, 3), torch.zeros(4, 1, 1, 1, dtype=torch.float64))
    decoder = DiscretizedGaussian(levels=256)
    whole = decoder.sample(gaussian, image_generators(0, range(4)))
    part = DiagonalGaussian(gaussian.mean[:2], gaussian.log_var[:2])
    assert torch.equal(decoder.sample(part, image_generators(0, [3, 1])), whole[[3, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", LEVELS)
def test_mode_is_the_nearest_level(levels: int, dtype: torch.dtype) -> None:
    mean = means(dtype).reshape(-1, 1, 1, 1)
    gaussian = DiagonalGaussian(mean, torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    decoder = DiscretizedGaussian(levels=levels)
    mode = decoder.mode(gaussian)
    assert mode.dtype == dtype
    distance = (mean.double().reshape(-1, 1) - grey(levels)).abs()
    gap = (mean.double() - mode.double()).abs().flatten() - distance.min(dim=1).values
    assert float(gap.abs().max()) < 1e-6
    # a level is its own mode, and log_prob knows it as a level
    exact = grey(levels, dtype).reshape(1, 1, 1, -1)
    again = decoder.mode(DiagonalGaussian(exact, gaussian.log_var))
    torch.testing.assert_close(again, exact, rtol=0, atol=1e-6)


def test_mode_has_the_largest_mass_away_from_the_ends() -> None:
    levels = grey(17)
    for mean in (-0.5, 0.01, 0.44):
        one = DiagonalGaussian(torch.full((1, 1, 1, 17), mean).double(), torch.full((1, 1, 1, 1), 0.01).double().log())
        decoder = DiscretizedGaussian(levels=17)
        best = levels[decoder.level_log_prob(levels.reshape(1, 1, 1, 17), one).argmax()]
        assert float(decoder.mode(one)[0, 0, 0, 0]) == pytest.approx(float(best), abs=1e-12)


def test_plain_gaussian() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, mean = (torch.randn(4, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    log_var = torch.randn(4, 1, 1, 1, generator=generator, dtype=torch.float64)
    gaussian, decoder = DiagonalGaussian(mean, log_var), PlainGaussian(levels=256)
    expected = Normal(mean, (0.5 * log_var).exp().expand_as(mean)).log_prob(x0).sum((1, 2, 3))
    torch.testing.assert_close(decoder.log_prob(x0, gaussian), expected, rtol=1e-12, atol=1e-10)
    assert torch.equal(decoder.mode(gaussian), mean)
    draws = decoder.sample(gaussian, torch.Generator().manual_seed(1))
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(draws, mean + (0.5 * log_var).exp() * noise, rtol=1e-12, atol=1e-12)


def test_density_and_probability_are_told_apart() -> None:
    """Trap 17: for bins much narrower than the Gaussian, log P - log density is the log of the spacing."""
    plain, discrete = PlainGaussian(levels=256), DiscretizedGaussian(levels=256)
    assert plain.is_density and not discrete.is_density
    assert discrete.spacing == pytest.approx(2 / 255)
    x0 = grey(256)[100].reshape(1, 1, 1, 1)
    gaussian = DiagonalGaussian(torch.zeros(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double())
    difference = discrete.log_prob(x0, gaussian) - plain.log_prob(x0, gaussian)
    assert float(difference) == pytest.approx(math.log(2 / 255), abs=1e-5)


@pytest.mark.parametrize("levels", [1, 0, -5, 257, 65536])
@pytest.mark.parametrize("decoder", [CategoricalDecoder, DiscretizedGaussian, PlainGaussian])
def test_levels_errors(decoder: type, levels: int) -> None:
    with pytest.raises(InputError, match=f"levels = {levels} must lie between 2 and 256"):
        decoder(levels=levels)


# --- the categorical decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("levels", LEVELS)
def test_categorical_is_the_normalised_likelihood(levels: int, var: float, dtype: torch.dtype) -> None:
    mean = means(dtype)
    x0 = grey(levels, dtype).reshape(1, 1, 1, -1).expand(len(mean), 1, 1, -1)
    gaussian = DiagonalGaussian(
        mean.reshape(-1, 1, 1, 1).expand_as(x0), torch.full((len(mean), 1, 1, 1), var, dtype=torch.float64).log()
    )
    log_prob = CategoricalDecoder(levels).level_log_prob(x0, gaussian)[:, 0, 0].double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert (log_prob.exp().sum(1) - 1).abs().max() < tolerance
    if dtype == torch.float64:
        density = norm.logpdf(mean.double().numpy()[:, None], grey(levels).numpy()[None], math.sqrt(var))
        shifted = density - density.max(1, keepdims=True)
        expected = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        np.testing.assert_allclose(log_prob.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_categorical_log_prob_sums_over_pixels_of_any_number_of_images() -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = grey(17)[torch.randint(17, (19, 2, 3, 4), generator=generator)]
    mean = x0 + 0.1 * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    decoder = CategoricalDecoder(levels=17)
    for log_var in (torch.full((1, 1, 1, 1), -4.0), torch.linspace(-6, -2, 19).reshape(-1, 1, 1, 1)):
        gaussian = DiagonalGaussian(mean, log_var.double())
        expected = decoder.level_log_prob(x0, gaussian).flatten(1).sum(1)
        torch.testing.assert_close(decoder.log_prob(x0, gaussian), expected, rtol=1e-12, atol=0)


def test_categorical_draws_follow_the_probabilities() -> None:
    decoder, n = CategoricalDecoder(levels=17), 40_000
    log_var = torch.full((1, 1, 1, 1), 0.02, dtype=torch.float64).log()
    gaussian = DiagonalGaussian(torch.full((n, 1, 1, 1), 0.3, dtype=torch.float64), log_var)
    samples = decoder.sample(gaussian, torch.Generator().manual_seed(0)).flatten()
    one = DiagonalGaussian(torch.full((1, 1, 1, 17), 0.3, dtype=torch.float64), log_var)
    probabilities = decoder.level_log_prob(grey(17).reshape(1, 1, 1, -1), one).exp().flatten()
    for level, p in zip(grey(17), probabilities, strict=True):
        share = float(((samples - level).abs() < 1e-9).double().mean())
        assert abs(share - float(p)) <= 4 * math.sqrt(float(p * (1 - p)) / n) + 1e-9
    assert torch.equal(decoder.mode(gaussian).unique(), grey(17)[10:11])


def test_categorical_decoder_does_without_the_denoiser() -> None:
    """Its Gaussian is q(x_1|x_0) read in x_0, and the reconstruction term is that of the definition."""
    x0 = grey(256).reshape(1, 1, 16, 16)

    class Untouched(torch.nn.Module):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            raise AssertionError("the network was evaluated")

    model = DiffusionModel(
        Untouched(),
        LinearGamma(-9.0, 5.0, T=3),
        EpsParameterization(),
        GammaConditioning(),
        FixedSmallVariance(),
        CategoricalDecoder(256),
    )
    alpha, sigma = math.sqrt(1 / (1 + math.exp(-9.0))), math.sqrt(1 / (1 + math.exp(9.0)))
    x1 = alpha * x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density = norm.logpdf(x1.flatten().numpy()[:, None], alpha * grey(256).numpy()[None], sigma)
    expected = (np.diag(density) - np.logaddexp.reduce(density, 1)).sum()
    value = model.decoder.log_prob(x0, model.decoder_gaussian(x1))
    assert float(value) == pytest.approx(expected, rel=1e-9)
