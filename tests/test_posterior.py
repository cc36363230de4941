"""Denoisers of the posterior of a linear measurement, against the exact one of Gaussian data."""

from collections.abc import Callable

import pytest
import torch
from oracles import assert_covariance
from torch import Tensor
from worlds_cases import CORRELATED, EYE, GAMMAS, SCHEDULE, TIMES, exact, network_model, noise, states_of
from worlds_chain import Chain, chain_of, optimal_model
from worlds_gaussian import CorrelatedGaussianWorld

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    AverageOperator,
    Denoiser,
    DenoisingOperator,
    DPSDenoiser,
    LinearMeasurement,
    LinearOperator,
    MaskOperator,
    MatrixOperator,
    MMPSDenoiser,
)
from ddpm_lightning.process.posterior import conjugate_gradients
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler

NOISE = 0.1
MASK = torch.tensor([[[True, False], [False, True]]])
MATRIX = torch.tensor([[1.0, -1, 0, 2], [0.5, 0, 1, 0], [0, 1, 1, 1]], dtype=torch.float64)
OPERATORS: dict[str, tuple[LinearOperator, Tensor]] = {
    "mask": (MaskOperator(MASK), EYE * MASK.flatten()),
    "denoising": (DenoisingOperator(), EYE),
    "average": (AverageOperator(2), torch.full((1, 4), 0.25, dtype=torch.float64)),
    "matrix": (MatrixOperator(MATRIX, (1, 2, 2)), MATRIX),
}
"""Each operator, and its matrix by other means."""


def measured(name: str) -> tuple[LinearMeasurement, CorrelatedGaussianWorld]:
    """A measurement of one image, and the exact posterior."""
    operator, matrix = OPERATORS[name]
    y = operator.apply(torch.tensor([0.9, -0.3, 0.4, -0.8], dtype=torch.float64).reshape(1, 1, 2, 2))
    return LinearMeasurement(operator, y, NOISE), CorrelatedGaussianWorld(
        *CORRELATED.posterior(matrix, y.flatten(), NOISE)
    )


class DPSWorld(CorrelatedGaussianWorld):
    """Correlated Gaussian data as DPS sees them, whose x0-hat is linear in x_t, so that its moments are exact."""

    def __init__(self, matrix: Tensor, y: Tensor, noise_var: float, scale: float = 1.0) -> None:
        super().__init__(CORRELATED.mean, CORRELATED.cov)
        self.matrix, self.y, self.weight = matrix, y, scale / noise_var

    def x0_map(self, chain: Chain, n: int) -> tuple[Tensor, Tensor]:
        gain, offset = super().x0_map(chain, n)
        cov = self.cov - gain @ (chain.alpha[n] * self.cov)
        pull = self.weight * cov @ self.matrix.T
        return gain - pull @ self.matrix @ gain, offset + pull @ (self.y - self.matrix @ offset)


# --- operators


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_their_matrices_and_adjoints(name: str) -> None:
    operator, matrix = OPERATORS[name]
    x = noise(5)
    y = operator.apply(x)
    torch.testing.assert_close(y.flatten(1), x.flatten(1) @ matrix.T)
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    torch.testing.assert_close(operator.adjoint(v).flatten(1), v.flatten(1) @ matrix)


def test_averages_of_larger_images() -> None:
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).reshape(2, 3, 4, 6)
    y = AverageOperator(2).apply(x)
    assert y.shape == (2, 3, 2, 3) and float(y[1, 2, 1, 2]) == float(x[1, 2, 2:, 4:].mean())
    v = y.cos()
    torch.testing.assert_close((AverageOperator(2).adjoint(v) * x).sum(), (v * y).sum())


def test_a_mask_for_each_image() -> None:
    x, mask = noise(2), torch.stack([MASK, ~MASK])
    assert torch.equal(MaskOperator(mask).apply(x), torch.where(mask, x, 0))


def test_conjugate_gradients_solve_image_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + 0.5 * torch.eye(6, dtype=torch.float64)
    b = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    b[1] = 0

    def multiply(v: Tensor) -> Tensor:
        return (matrix @ v[..., None])[..., 0]

    expected = torch.linalg.solve(matrix, b)
    torch.testing.assert_close(conjugate_gradients(multiply, b, 8), expected, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(conjugate_gradients(multiply, b, 2), expected, rtol=1e-2)
    torch.testing.assert_close(conjugate_gradients(lambda v: 2 * v, b, 1), b / 2)
    assert torch.equal(conjugate_gradients(lambda v: -v, b, 3), torch.zeros_like(b))


# --- MMPS


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("name", OPERATORS)
def test_mmps_is_exact_for_gaussian_data(name: str, t: float) -> None:
    measurement, posterior = measured(name)
    x_t = noise(20)
    denoiser = MMPSDenoiser(optimal_model(CORRELATED, SCHEDULE).denoiser, measurement, iterations=6)
    prediction = denoiser(x_t, torch.tensor(t, dtype=torch.float64))
    torch.testing.assert_close(prediction.x0, exact(posterior, x_t, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["mask", "average"])
def test_states_of_mmps(name: str) -> None:
    measurement, posterior = measured(name)
    model = optimal_model(CORRELATED, SCHEDULE).with_denoiser(lambda d: MMPSDenoiser(d, measurement, 4))
    chain = chain_of(GAMMAS)
    for sampler, expected in (
        (AncestralSampler(), posterior.ancestral_moments(chain, "beta")),
        (DDIMSampler(), posterior.ddim_moments(chain, 0.0)),
    ):
        for state, moments in zip(states_of(model, sampler, 20_000), expected, strict=True):
            assert_covariance(state, *moments)


def test_mmps_of_mmps_takes_two_measurements() -> None:
    """Measured twice with the same noise is measured once with half of it."""
    measurement, _ = measured("matrix")
    base, x_t, t = optimal_model(CORRELATED, SCHEDULE).denoiser, noise(5), torch.tensor(0.5, dtype=torch.float64)
    half = LinearMeasurement(measurement.operator, measurement.y, NOISE / 2)
    # three iterations for three components: gradients of more would be those of rounding
    twice = MMPSDenoiser(MMPSDenoiser(base, measurement, 3), measurement, 3)
    torch.testing.assert_close(twice(x_t, t).x0, MMPSDenoiser(base, half, 3)(x_t, t).x0, rtol=1e-6, atol=1e-6)


# --- DPS


@pytest.mark.parametrize("name", OPERATORS)
def test_states_of_dps_are_those_of_its_own_chain(name: str) -> None:
    """With less weight, so that eight steps do not diverge."""
    measurement, _ = measured(name)
    model = optimal_model(CORRELATED, SCHEDULE).with_denoiser(lambda d: DPSDenoiser(d, measurement, 0.2))
    world = DPSWorld(OPERATORS[name][1], measurement.y.flatten(), NOISE, 0.2)
    states = states_of(model, AncestralSampler(), 10_000)
    for state, moments in zip(states, world.ancestral_moments(chain_of(GAMMAS), "beta"), strict=True):
        assert_covariance(state, *moments)


def dps_image(noise_var: float, T: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mean and covariance of DPS's image, and the exact ones, of pixels 0 and 3 measured."""
    y = measured("mask")[0].y.flatten()
    chain = chain_of([-9 + 18 * i / (T - 1) for i in range(T)])
    world = DPSWorld(OPERATORS["mask"][1], y, noise_var)
    return world.ancestral_moments(chain, "beta")[-1], CORRELATED.posterior(world.matrix, y, noise_var)


def test_how_far_dps_is_from_the_posterior() -> None:
    """Exact moments, no sampling, T = 1000: the variance of measured pixels is too small, the more so the less noise
    there is. Its pull towards y is C A^T / noise_var, the posterior's C A^T (noise_var I + A C A^T)^-1."""
    measured_pixels, figures = MASK.flatten(), []
    for noise_var in (1.0, 0.1, 0.01):
        (mean, cov), (exact_mean, exact_cov) = dps_image(noise_var, 1000)
        variances, exact_variances = cov.diagonal(), exact_cov.diagonal()
        ratio = variances[measured_pixels].sum() / exact_variances[measured_pixels].sum()
        figures.append((float(ratio), float(((mean - exact_mean).abs() / exact_variances.sqrt()).max())))
    # the table of docs/sampling.md: variance ratio, error of the mean in posterior standard deviations
    expected = [(0.959, 0.044), (0.639, 0.692), (0.504, 0.889)]
    assert figures == [pytest.approx(row, abs=6e-4) for row in expected]


# --- the contract of wrappers

WRAPS: dict[str, Callable[[LinearMeasurement], Callable[[Denoiser], Denoiser]]] = {
    "dps": lambda measurement: lambda denoiser: DPSDenoiser(denoiser, measurement),
    "mmps": lambda measurement: lambda denoiser: MMPSDenoiser(denoiser, measurement, 2),
}


@pytest.mark.parametrize("name", WRAPS)
def test_any_autograd_mode_gives_the_same(name: str) -> None:
    model, x_t, t = network_model(), noise(3), torch.tensor(0.5, dtype=torch.float64)
    wrap = WRAPS[name](LinearMeasurement(MaskOperator(MASK), 0.1 * noise(1), NOISE))
    plain = model.with_denoiser(wrap).reverse_process.denoiser(x_t, t)
    assert not plain.x0.requires_grad and model.network.gain.grad is None
    with torch.inference_mode():
        wrap = WRAPS[name](LinearMeasurement(MaskOperator(MASK.clone()), 0.1 * noise(1), NOISE))
        inference = model.with_denoiser(wrap).reverse_process.denoiser(x_t.clone(), t.clone())
    assert torch.equal(plain.x0, inference.x0) and torch.equal(plain.eps, inference.eps)


@pytest.mark.parametrize("name", WRAPS)
def test_an_image_does_not_depend_on_the_batch(name: str) -> None:
    x_T, y, mask = noise(6, size=4), 0.3 * noise(6, seed=5, size=4), MASK.repeat(1, 2, 2)

    def run(order: list[int]) -> Tensor:
        measurement = LinearMeasurement(MaskOperator(mask), y[order], NOISE)
        model = network_model().with_denoiser(WRAPS[name](measurement))
        return AncestralSampler()(model, x_T[order], generators=image_generators(4, order))

    whole = run(list(range(6)))
    for order in ([5, 0, 3], [2], list(range(5, -1, -1))):
        assert torch.equal(run(order), whole[order])


def test_measurement_errors() -> None:
    x = noise(3)
    for noise_var in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"noise_var = .* must be positive"):
            LinearMeasurement(DenoisingOperator(), x, noise_var)
    for y in (noise(2), torch.zeros(3, 1, 2, 3)):
        with pytest.raises(InputError, match="y has shape"):
            LinearMeasurement(DenoisingOperator(), y, 0.1).residual(x)
    for mask in (torch.ones(2, 2), torch.ones(1, 2, 3), torch.ones(2, 1, 2, 2), torch.ones(2, 2, 2)):
        with pytest.raises(InputError, match=r"mask of shape .* for images \[3, 1, 2, 2\]"):
            MaskOperator(mask.bool()).apply(x)
    with pytest.raises(InputError, match=r"torch\.float32 .*give torch\.bool"):
        MaskOperator(torch.ones(1, 2, 2)).apply(x)
    with pytest.raises(InputError, match="factor = 0 must be 1 or more"):
        AverageOperator(0)
    with pytest.raises(InputError, match="factor = 2 does not divide images of 3 x 4"):
        AverageOperator(2).apply(torch.zeros(1, 1, 3, 4))
    with pytest.raises(InputError, match=r"give \[M, 4\]"):
        MatrixOperator(torch.zeros(3, 5), (1, 2, 2))
    with pytest.raises(InputError, match="iterations = 0"):
        MMPSDenoiser(network_model().denoiser, LinearMeasurement(DenoisingOperator(), x, 0.1), 0)
