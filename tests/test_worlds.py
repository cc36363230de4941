"""The bound in every form, schedule, parameterisation and variance, in worlds where its expectation is known.

The exact worlds are first checked against each other and against independent integration, then the package against
them. A new schedule, parameterisation, variance, form or world is one more entry of the tables below.
"""

import json
import math
from functools import cache
from itertools import combinations, pairwise, product
from pathlib import Path

import pytest
import torch
from oracles import ScalarGaussianWorld, linear_betas
from scipy.integrate import quad
from torch import Tensor
from worlds_cases import BETAS, CORRELATED, IMAGES, PIXELS
from worlds_chain import (
    OUTPUTS,
    Chain,
    Scales,
    Terms,
    Variances,
    World,
    chain_of,
    exploding,
    gammas_of_betas,
    optimal_model,
    preserving,
)
from worlds_gaussian import CorrelatedGaussianWorld
from worlds_mixture import MixtureWorld, learned_schedule_problem

from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousElbo,
    DenoisingElbo,
    ElboEstimator,
    NegativeElbo,
    TrajectoryElbo,
)
from ddpm_lightning.process import (
    AnalyticVariance,
    DiffusionModel,
    FixedLargeVariance,
    FixedSmallVariance,
    LearnedRangeVariance,
    ReverseVariance,
)
from ddpm_lightning.schedules import (
    BetaChain,
    CosineChain,
    CosineGamma,
    LearnedGamma,
    LinearChain,
    LinearGamma,
    Schedule,
    VarianceExploding,
)


class ScalarWorld(CorrelatedGaussianWorld):
    """One dimension, whose exact terms come from ``ScalarGaussianWorld``."""

    def terms(self, chain: Chain, variance: Variances) -> Terms:
        if variance not in ("beta", "posterior") or bool((chain.alpha == 1).all()):
            return super().terms(chain, variance)
        betas = [1 - float((new / old) ** 2) for old, new in pairwise(chain.alpha)]
        terms = ScalarGaussianWorld(float(self.mean), float(self.cov), betas, str(variance)).terms()
        elbo = terms["denoising_form"]["elbo"]
        return {**terms, "trajectory_form": {"path_log_ratio": terms["reconstruction"] - elbo, "elbo": elbo}}


WORLDS: dict[str, tuple[World, tuple[int, int, int]]] = {
    "scalar": (ScalarWorld([0.3], [[0.6]]), (1, 4, 4)),
    "correlated": (CORRELATED, (1, 2, 2)),
    "mixture of pixels": (PIXELS, (1, 4, 4)),
    "mixture of images": (IMAGES, (1, 2, 2)),
}
"""Worlds, and the shape of the images that the package is given."""

_COSINES = [math.cos((i / 8 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(9)]

SCHEDULES: dict[str, tuple[Schedule, list[float]]] = {
    "linear": (LinearChain(8, 0.02, 0.6), gammas_of_betas(linear_betas(8, 0.02, 0.6))),
    "cosine": (CosineChain(8), gammas_of_betas([min(1 - low / high, 0.999) for high, low in pairwise(_COSINES)])),
    "betas": (BetaChain(BETAS), gammas_of_betas(BETAS)),
    "linear gamma": (LinearGamma(-5.0, 4.0, T=8), [-5 + 9 * i / 7 for i in range(8)]),
}
"""Schedules, and the gammas of their states by hand."""


def learned_gammas() -> list[float]:
    """LearnedGamma(-5, 4, T=8, units=2) as it starts: a line and two small sigmoids, scaled to the ends."""
    heights, rates, centres = [0.05, 0.05], [4.0, 4.0], [0.25, 0.75]

    def g(t: float) -> float:
        sigmoids = (h / (1 + math.exp(-r * (t - m))) for h, r, m in zip(heights, rates, centres, strict=True))
        return t + sum(sigmoids)

    return [-5 + 9 * (g(i / 7) - g(0)) / (g(1) - g(0)) for i in range(8)]


_FIRST, _LAST = math.atan(math.exp(-2.5)), math.atan(math.exp(2.0))
SCHEDULES["cosine gamma"] = (
    CosineGamma(-5.0, 4.0, T=8),
    [2 * math.log(math.tan(_FIRST + (_LAST - _FIRST) * i / 7)) for i in range(8)],
)
SCHEDULES["learned gamma"] = (LearnedGamma(-5.0, 4.0, T=8, units=2).requires_grad_(False), learned_gammas())
SCHEDULES["variance exploding"] = (VarianceExploding(LinearGamma(-5.0, 4.0, T=8)), [-5 + 9 * i / 7 for i in range(8)])


def scales_of(schedule: str) -> Scales:
    return exploding if schedule == "variance exploding" else preserving


def chain_by_name(schedule: str) -> Chain:
    """The exact chain of a schedule of the table; the prior of variance explosion has the variance of x_T for data of
    variance 1."""
    gammas = SCHEDULES[schedule][1]
    if schedule == "variance exploding":
        return chain_of(gammas, exploding, prior_var=1 + math.exp(gammas[-1]))
    return chain_of(gammas)


PARAMETERIZATIONS = {output.__name__: output() for output in OUTPUTS}
VARIANCES: dict[str, str] = {"large": "beta", "small": "posterior", "range": "range", "analytic": "optimal"}
"""The package's variances, and how the exact worlds call them (lists of values are known too)."""


def reverse_variance(name: str, world: str, schedule: str) -> ReverseVariance:
    """The package's variance; the analytic one from the exact error of eps, (alpha / sigma)^2 that of x_0."""
    if name == "analytic":
        source, chain = WORLDS[world][0], chain_by_name(schedule)
        alpha, sigma2 = chain.alpha[1:], chain.sigma2[1:]
        error = source.error(alpha, sigma2) * alpha**2 / sigma2 / source.dims
        return AnalyticVariance(SCHEDULES[schedule][1], error.tolist())
    return {"large": FixedLargeVariance, "small": FixedSmallVariance, "range": LearnedRangeVariance}[name]()


FORMS: dict[str, ElboEstimator] = {
    "denoising_form": DenoisingElbo(),
    "consistency_form": ConsistencyElbo(),
    "trajectory_form": TrajectoryElbo(),
    "continuous_form": ContinuousElbo(8),
}


def floats(terms: Terms) -> dict[str, dict[str, float]]:
    """The exact terms of each form, reconstruction included."""
    reconstruction = float(terms["reconstruction"])
    return {
        form: {"reconstruction": reconstruction, **{name: float(value) for name, value in values.items()}}
        for form, values in terms.items()
        if isinstance(values, dict)
    }


def exact_terms(world: World, chain: Chain, gammas: list[float], variance: Variances) -> dict[str, dict[str, float]]:
    """Nats an event, by form and name, continuous time included."""
    exact = floats(world.terms(chain, variance))
    reconstruction, prior = exact["denoising_form"]["reconstruction"], exact["denoising_form"]["prior_matching"]
    diffusion = world.diffusion(gammas[0], gammas[-1])
    exact["continuous_form"] = {
        "reconstruction": reconstruction,
        "prior_matching": prior,
        "diffusion": diffusion,
        "elbo": reconstruction - prior - diffusion,
    }
    return exact


def misses(values: Tensor, expected: float, name: str, max_relative_se: float = 0.03) -> list[str]:
    """What is wrong with independent ``values`` whose mean should be this one."""
    mean, se = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    found = [] if se <= max_relative_se * abs(expected) else [f"{name}: se {se:.2g} is too large for {expected:.6g}"]
    return found if abs(mean - expected) <= 4 * se else [*found, f"{name}: {mean:.6g} +- {se:.2g}, not {expected:.6g}"]


@cache
def exact_case(world: str, schedule: str, variance: str) -> dict[str, dict[str, float]]:
    """The exact terms of a case of the grid, of which several parameterisations have a share."""
    return exact_terms(WORLDS[world][0], chain_by_name(schedule), SCHEDULES[schedule][1], VARIANCES[variance])


# --- the grid


def model_of(world: str, schedule: str, parameterization: str, variance: str) -> DiffusionModel:
    parts = PARAMETERIZATIONS[parameterization], reverse_variance(variance, world, schedule), scales_of(schedule)
    return optimal_model(WORLDS[world][0], SCHEDULES[schedule][0], *parts)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_term_of_every_form(world: str, schedule: str, variance: str) -> None:
    source, shape = WORLDS[world]
    model, exact = model_of(world, schedule, "EpsParameterization", variance), exact_case(world, schedule, variance)
    events = math.prod(shape) // source.dims
    seed = 1000 + list(product(WORLDS, SCHEDULES, VARIANCES)).index((world, schedule, variance))
    generator = torch.Generator().manual_seed(seed)
    # what the limit on the standard errors needs: the reconstruction is small for the cosine chain
    pixels = 48_000 if schedule == "cosine" else 24_000
    found, totals = [], {}
    for form, estimator in FORMS.items():
        x0 = source.draw((pixels // math.prod(shape), *shape), generator)
        values = {name: value / events for name, value in estimator(model, x0, generator).named().items()}
        assert set(values) == set(exact[form]) == set(estimator.term_names)
        for name, value in values.items():
            found += misses(value, exact[form][name], f"{form}, {name}")
        totals[form] = values["elbo"]
    del totals["continuous_form"]
    for a, b in combinations(totals, 2):
        difference = totals[a].mean() - totals[b].mean()
        se = math.sqrt((float(totals[a].var()) + float(totals[b].var())) / len(totals[a]))
        if abs(float(difference)) > 4 * se:
            found.append(f"{a} and {b} differ by {float(difference):.3g} +- {se:.2g}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_term_is_that_of_any_parameterization(world: str, schedule: str, variance: str) -> None:
    """Image by image, for the same noise and steps: what is exact of one is exact of all."""
    source, shape = WORLDS[world]
    x0 = source.draw((20, *shape), torch.Generator().manual_seed(0))
    models = [model_of(world, schedule, name, variance) for name in PARAMETERIZATIONS]
    for form in (DenoisingElbo(2), ConsistencyElbo(2), TrajectoryElbo(2), ContinuousElbo(2)):
        first, *others = (form(model, x0, torch.Generator().manual_seed(1)).named() for model in models)
        for other in others:
            for name, value in first.items():
                torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_every_reverse_step(world: str, schedule: str, parameterization: str) -> None:
    """p(x_n | x_{n+1}) itself, with no noise: at the optimum the bound is stationary in the denoiser and nearly so in
    the variances, so small errors of either are seen here and not there."""
    source, shape = WORLDS[world]
    chain = chain_by_name(schedule)
    tolerance = 1e-5 if schedule == "learned gamma" else 1e-8  # its parameters are float32
    _, _, c0, ct, _ = chain.between(1)
    generator = torch.Generator().manual_seed(0)
    for name, exact_variance in VARIANCES.items():
        model = model_of(world, schedule, parameterization, name)
        expected_vars = source.reverse_vars(chain, exact_variance)
        for n in range(chain.T):
            alpha, sigma2 = chain.alpha[n + 1], chain.sigma2[n + 1]
            x_t = alpha * source.draw((7, *shape), generator)
            x_t = x_t + sigma2.sqrt() * torch.randn(x_t.shape, generator=generator, dtype=torch.float64)
            s, t = model.grid[n], model.grid[n + 1]
            step = model.decoder_gaussian(x_t) if n == 0 else model.reverse_process.transition(x_t, s, t)
            x0 = source.x0_mean(x_t.reshape(7, -1, source.dims), alpha, sigma2).reshape(x_t.shape)
            torch.testing.assert_close(step.mean, c0[n] * x0 + ct[n] * x_t, rtol=tolerance, atol=tolerance)
            actual_vars = torch.exp(step.log_var).expand_as(x_t)
            torch.testing.assert_close(actual_vars, expected_vars[n].expand_as(x_t), rtol=tolerance, atol=0)


# --- the exact worlds themselves


@pytest.mark.parametrize("variance", ["beta", "posterior", "optimal", "list"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", WORLDS)
def test_forms_have_one_total_below_log_p(world: str, schedule: str, variance: str) -> None:
    source, gammas = WORLDS[world][0], SCHEDULES[schedule][1]
    values: Variances = [0.1, 0.2, 0.05, 0.3, 0.1, 0.5, 0.4, 0.6] if variance == "list" else variance
    exact = floats(source.terms(chain_of(gammas), values))
    totals = [terms["elbo"] for terms in exact.values()]
    assert totals == pytest.approx([totals[0]] * 3, abs=1e-10)
    assert totals[0] < source.log_p()
    optimal = float(source.exact_bound(gammas, "optimal"))
    assert optimal == pytest.approx(totals[0], abs=1e-10) if variance == "optimal" else optimal > totals[0]
    assert float(source.exact_bound(gammas, values)) == pytest.approx(totals[0], abs=1e-10)


@pytest.mark.parametrize("variance", ["beta", "posterior", "optimal"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world", ["scalar", "correlated"])
def test_matrices_agree_with_the_error_alone(world: str, schedule: str, variance: str) -> None:
    """Two derivations: joint covariances of all states, and nothing but E |x_0 - x0-hat|^2."""
    source, chain = WORLDS[world][0], chain_of(SCHEDULES[schedule][1])
    by_matrices, by_errors = floats(source.terms(chain, variance)), floats(World.terms(source, chain, variance))
    for form, terms in by_matrices.items():
        assert by_errors[form] == pytest.approx(terms, abs=1e-10), form


@pytest.mark.parametrize("index", range(6))
def test_worlds_have_the_values_of_the_case_file(index: int) -> None:
    """The scalar, the diagonal, and the mixture of one component."""
    case = json.loads((Path(__file__).parents[1] / "scripts" / "bound_cases.json").read_text())[index]
    mean, var = case["data_mean"], case["data_var"]
    chain = chain_of(gammas_of_betas(linear_betas(case["T"], case["beta_start"], case["beta_end"])))
    worlds: list[tuple[World, int]] = [
        (ScalarWorld([mean], [[var]]), 1),
        (CorrelatedGaussianWorld([mean] * 3, var * torch.eye(3, dtype=torch.float64)), 3),
        (MixtureWorld([1.0], [mean], math.sqrt(var)), 1),
    ]
    for world, dims in worlds:
        exact = world.terms(chain, case["reverse_variance"])
        for form in ("consistency_form", "denoising_form"):
            values = exact[form]
            assert isinstance(values, dict)
            for name, value in case[form].items():
                assert float(values[name]) / dims == pytest.approx(value, rel=1e-9, abs=1e-9), name
        assert float(exact["reconstruction"]) / dims == pytest.approx(case["reconstruction"], rel=1e-9)
        if "log_p" in case:
            assert world.log_p() / dims == pytest.approx(case["log_p"], rel=1e-12)


def test_unequal_variances_add_up() -> None:
    chain = chain_of(SCHEDULES["linear"][1])
    means, variances = [0.3, -0.5, 1.0], [0.2, 0.7, 1.1]
    whole = floats(
        CorrelatedGaussianWorld(means, torch.diag(torch.tensor(variances, dtype=torch.float64))).terms(chain, "beta")
    )
    parts = [floats(ScalarWorld([m], [[v]]).terms(chain, "beta")) for m, v in zip(means, variances, strict=True)]
    for form, terms in whole.items():
        assert terms == pytest.approx({name: sum(part[form][name] for part in parts) for name in terms}, abs=1e-10)


def test_rotation_changes_nothing() -> None:
    """Isotropic noise sees the eigenvalues and the length of the mean along each eigenvector only."""
    chain = chain_of(SCHEDULES["cosine"][1])
    world = CORRELATED
    turned = CorrelatedGaussianWorld(world.mean @ world.vectors, torch.diag(world.values))
    for form, terms in floats(world.terms(chain, "posterior")).items():
        assert floats(turned.terms(chain, "posterior"))[form] == pytest.approx(terms, abs=1e-10)


@pytest.mark.parametrize("gamma", [-6.0, -1.0, 0.5, 4.0])
def test_error_of_the_mixture_by_adaptive_quadrature(gamma: float) -> None:
    """E x_0^2 - E x0-hat(x_t)^2, integrated over the mixture's density of x_t by another rule."""
    alpha2, sigma2 = 1 / (1 + math.exp(gamma)), 1 / (1 + math.exp(-gamma))

    def density_and_mean(x: float) -> tuple[float, float]:
        density = weighted = 0.0
        for w, m, v in zip(PIXELS.weights.tolist(), PIXELS.means[:, 0].tolist(), PIXELS.var.tolist(), strict=True):
            total = alpha2 * v + sigma2
            p = w * math.exp(-0.5 * (x - math.sqrt(alpha2) * m) ** 2 / total) / math.sqrt(2 * math.pi * total)
            # precision-weighted: x_t / alpha is a measurement of x_0 with variance sigma2 / alpha2
            mean = (m / v + x * math.sqrt(alpha2) / sigma2) / (1 / v + alpha2 / sigma2)
            density, weighted = density + p, weighted + p * mean
        return density, weighted / density

    def integrand(x: float) -> float:
        density, mean = density_and_mean(x)
        return density * mean**2

    expected = PIXELS.square() - quad(integrand, -9, 9, epsabs=1e-12, limit=400)[0]
    error = PIXELS.error(torch.tensor([alpha2]).double().sqrt(), torch.tensor([sigma2]).double())
    assert float(error) == pytest.approx(expected, abs=1e-8)


def test_log_p_of_the_mixture_by_adaptive_quadrature() -> None:
    def integrand(x: float) -> float:
        log_p = float(PIXELS.log_prob(torch.tensor([x], dtype=torch.float64)))
        return math.exp(log_p) * log_p

    assert PIXELS.log_p() == pytest.approx(quad(integrand, -5, 5, epsabs=1e-11, limit=300)[0], abs=1e-9)
    x0 = IMAGES.sample(40_000, torch.Generator().manual_seed(0))
    assert not misses(IMAGES.log_prob(x0), IMAGES.log_p(), "log p")


@pytest.mark.parametrize("world", ["mixture of pixels", "mixture of images", "correlated"])
def test_error_and_posterior_mean_by_monte_carlo(world: str) -> None:
    source, generator = WORLDS[world][0], torch.Generator().manual_seed(0)
    for gamma in (-4.0, 0.0, 2.0):
        alpha, sigma2 = (float(1 / (1 + math.exp(sign * gamma))) for sign in (1, -1))
        scales = torch.tensor(math.sqrt(alpha), dtype=torch.float64), torch.tensor(sigma2, dtype=torch.float64)
        x0 = source.sample(40_000, generator)
        x_t = scales[0] * x0 + scales[1].sqrt() * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        residual = x0 - source.x0_mean(x_t, *scales)
        expected = float(source.error(scales[0][None], scales[1][None]))
        assert not misses(residual.square().sum(1), expected, "error")
        # the residual of a conditional mean is orthogonal to any function of x_t
        for function in (x_t, x_t**3, torch.tanh(3 * x_t)):
            product_ = (residual * function).sum(1)
            assert abs(float(product_.mean())) < 4 * float(product_.std()) / math.sqrt(len(product_))


@pytest.mark.parametrize("world", [PIXELS, IMAGES])
def test_score_is_the_gradient_of_the_exact_density(world: MixtureWorld) -> None:
    """And Tweedie's formula ties it to the posterior mean, which is computed apart from it."""
    alpha, sigma2 = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    x_t = world.sample(50, torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(world.log_prob(x_t, alpha, sigma2).sum(), x_t)
    score = world.score(x_t, alpha, sigma2)
    torch.testing.assert_close(score, gradient)
    torch.testing.assert_close(world.x0_mean(x_t, alpha, sigma2), (x_t + sigma2 * score) / alpha)


def test_log_prob_of_the_mixture_is_normalised() -> None:
    x = torch.linspace(-14, 14, 40_001, dtype=torch.float64)[:, None]
    for alpha, sigma2 in ((1.0, 0.0), (0.5, 0.75), (1.0, 2.0)):
        density = PIXELS.log_prob(x, alpha, sigma2).exp()
        assert float(density.sum() * (x[1] - x[0])) == pytest.approx(1, abs=1e-6)
        cdf = torch.cumulative_trapezoid(density, x[:, 0])
        torch.testing.assert_close(PIXELS.cdf(x[1:, 0], alpha, sigma2), cdf, rtol=0, atol=2e-6)
    p = torch.tensor([0.001, 0.3, 0.77, 0.999], dtype=torch.float64)
    torch.testing.assert_close(PIXELS.cdf(PIXELS.quantile(p)), p)


def test_posterior_given_measurements() -> None:
    world = CORRELATED
    eye = torch.eye(4, dtype=torch.float64)
    x = torch.tensor([[0.2, -0.1, 0.5, 1.0]], dtype=torch.float64)
    # x_t is a measurement of x_0: two routes to E[x_0 | x_t]
    alpha, sigma2 = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.64, dtype=torch.float64)
    mean, cov = world.posterior(alpha * eye, x, float(sigma2))
    torch.testing.assert_close(mean, world.x0_mean(x, alpha, sigma2))
    assert float(torch.trace(cov)) == pytest.approx(float(world.error(alpha[None], sigma2[None])))
    # two pixels known exactly stay, the others follow by regression; two noisy rows by Bayes in information form
    mean, cov = world.posterior(eye[[0, 2]], x[:, [0, 2]], 0.0)
    torch.testing.assert_close(mean[:, [0, 2]], x[:, [0, 2]])
    known, free = [0, 2], [1, 3]
    slope = world.cov[free][:, known] @ torch.linalg.inv(world.cov[known][:, known])
    torch.testing.assert_close(mean[0, free], world.mean[free] + slope @ (x[0, known] - world.mean[known]))
    torch.testing.assert_close(cov[free][:, free], world.cov[free][:, free] - slope @ world.cov[known][:, free])
    operator = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.5, -1.0, 2.0]], dtype=torch.float64)
    noise = torch.tensor([[0.2, 0.05], [0.05, 0.1]], dtype=torch.float64)
    y = torch.tensor([[0.4, -0.3], [1.0, 0.2]], dtype=torch.float64)
    mean, cov = world.posterior(operator, y, noise)
    weight = operator.T @ torch.linalg.inv(noise)
    precision = torch.linalg.inv(world.cov) + weight @ operator
    torch.testing.assert_close(cov, torch.linalg.inv(precision))
    information = torch.linalg.solve(world.cov, world.mean) + y @ weight.T
    torch.testing.assert_close(mean, torch.linalg.solve(precision, information.T).T)


def test_diffusion_of_a_gaussian_is_elementary() -> None:
    world = CORRELATED
    for first, last in ((-5.0, 4.0), (-13.0, 5.0), (-0.3, 0.1)):
        expected = 0.5 * float(
            (torch.log1p(world.values * math.exp(-first)) - torch.log1p(world.values * math.exp(-last))).sum()
        )
        assert world.diffusion(first, last) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("variance", ["posterior", "optimal"])
def test_exploding_is_preserving_in_other_units(world: str, variance: str) -> None:
    """x_n / alpha_n, with a prior scaled likewise, is the same model with the same bound (beta is another choice)."""
    source, gammas = WORLDS[world][0], SCHEDULES["linear gamma"][1]
    chain = chain_of(gammas, exploding, prior_var=1 + math.exp(gammas[-1]))
    values = source.reverse_vars(chain, variance)
    if variance == "posterior":  # the decoder's stands for x_0, which has no other units
        values[0] = values[0] * chain_of(gammas).alpha[1] ** 2
    elbo = floats(World.terms(source, chain, values))["denoising_form"]["elbo"]
    assert elbo == pytest.approx(float(source.exact_bound(gammas, variance)), abs=1e-10)


# --- the bound approaches log p


def geometric(T: int) -> list[float]:
    return [-13 + 27 * i / (T - 1) for i in range(T)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("variance", ["beta", "posterior", "optimal"])
def test_bound_approaches_log_p_in_first_order(world: str, variance: str) -> None:
    """The ends of this chain cost less than 1e-5 nats, so all of the gap is the steps'. The decoder's variance is
    beta_1: the one that stands in for beta-tilde_1 shrinks with the step here, and the bound would diverge."""
    source = WORLDS[world][0]
    gaps = []
    for T in (101, 201, 401, 801):
        chain = chain_of(geometric(T))
        values = source.reverse_vars(chain, variance)
        values = torch.cat([source.reverse_vars(chain, "beta")[:1], values[1:]])
        gaps.append(source.log_p() - float(World.terms(source, chain, values)["denoising_form"]["elbo"]))
    if variance == "optimal" and source.dims == 1 and isinstance(source, CorrelatedGaussianWorld):
        assert max(map(abs, gaps)) < 1e-5  # the reverse steps of scalar Gaussian data are Gaussian: nothing is lost
        return
    orders = [math.log2(a / b) for a, b in pairwise(gaps)]
    assert all(gap > 0 for gap in gaps) and all(0.9 < order < 1.1 for order in orders), (gaps, orders)


@pytest.mark.parametrize("world", WORLDS)
def test_bound_approaches_the_continuous_one(world: str) -> None:
    source = WORLDS[world][0]
    gammas = geometric(401)
    terms = exact_terms(source, chain_of(gammas), gammas, "beta")
    coarse = float(source.exact_bound(geometric(201), "beta"))
    limit, fine = terms["continuous_form"]["elbo"], terms["denoising_form"]["elbo"]
    assert limit > fine > coarse
    assert 2 * fine - coarse == pytest.approx(limit, abs=0.05 * (limit - fine))  # Richardson's extrapolation
    assert limit == pytest.approx(source.log_p(), abs=2e-5)


# --- the best schedule


def test_bound_is_differentiable_in_gammas() -> None:
    gammas = torch.tensor(SCHEDULES["linear gamma"][1], dtype=torch.float64, requires_grad=True)
    for world, _ in WORLDS.values():
        if not isinstance(world, ScalarWorld):  # whose exact terms are floats
            assert torch.autograd.gradcheck(world.exact_bound, (gammas,))


def test_a_learned_schedule_reaches_a_better_bound_than_every_fixed_one() -> None:
    """The package's LearnedGamma, trained by the package's objective on draws from the mixture; judged exactly."""
    problem = learned_schedule_problem()
    name, best = problem.best_fixed()
    gammas = problem.fixed[name]
    schedule = LearnedGamma(gammas[0], gammas[-1], T=8, units=8)
    model = optimal_model(problem.world, schedule)
    objective, generator = NegativeElbo(DenoisingElbo()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for _ in range(60):
        optimizer.zero_grad()
        objective(model, problem.world.draw((16, 1, 4, 4), generator), generator).mean().backward()
        optimizer.step()
        decay.step()
    learned = float(problem.bound(schedule.gamma(schedule.grid()[1:]).detach()))
    optimum = float(problem.bound(problem.optimum(name)))
    assert best + 0.05 < learned <= optimum + 1e-3, (best, learned, optimum)


@pytest.mark.parametrize("variance", ["beta", "optimal"])
def test_best_gammas_beat_every_fixed_schedule(variance: str) -> None:
    problem = learned_schedule_problem(variance=variance)
    name, best = problem.best_fixed()
    gammas = problem.optimum(name)
    learned = float(problem.bound(gammas))
    assert bool((gammas.diff() > 0).all())
    assert best + 0.01 < learned < problem.world.log_p()
    # another start finds no better one: it is the optimum, to what the descent resolves
    others = [float(problem.bound(problem.optimum(start))) for start in problem.fixed]
    assert max(others) == pytest.approx(learned, abs=1e-3)
