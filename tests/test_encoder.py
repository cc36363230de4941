"""Learned encoders and gammas for each pixel: every term against the Gaussian that the forward process is given x_0."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles import assert_mean
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import UNet
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousElbo,
    ContinuousNegativeElbo,
    DenoisingElbo,
    ElboEstimator,
    HybridObjective,
    NegativeElbo,
    NoiseMSE,
    TrajectoryElbo,
    UniformTimes,
    path_log_probs,
    state_bound,
)
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    AnalyticVariance,
    CategoricalDecoder,
    DiffusionLevel,
    DiffusionModel,
    FixedLargeVariance,
    FixedSmallVariance,
    GammaConditioning,
    IdentityEncoder,
    LearnedRangeVariance,
    NetworkEncoder,
    PlainGaussian,
    TimeConditioning,
    VParameterization,
    X0Parameterization,
    eps_mse_table,
)
from ddpm_lightning.samplers import (
    AncestralSampler,
    DDIMSampler,
    DPMSolverSampler,
    HeunSampler,
    ProbabilityFlow,
    ReplacementSampler,
)
from ddpm_lightning.schedules import CosineChain, LearnedGamma, LinearGamma, PixelwiseGamma, Schedule, VarianceExploding

SHAPE = (1, 2, 2)
DIMS = 4


class Linear(nn.Module):
    """G(c) x + h with G = A + c B: a denoiser, or an encoder's network, that keeps everything Gaussian."""

    def __init__(self, seed: int, scale: float) -> None:
        super().__init__()
        draws = scale * torch.randn(2 * DIMS + 1, DIMS, generator=torch.Generator().manual_seed(seed)).double()
        self.a, self.b, self.h = (nn.Parameter(part) for part in (draws[:DIMS], draws[DIMS:-1], draws[-1]))

    def map(self, c: float) -> tuple[Tensor, Tensor]:
        return (self.a + c * self.b).detach(), self.h.detach()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        gain = self.a + c.to(x)[:, None, None] * self.b
        return (torch.einsum("bij,bj->bi", gain, x.flatten(1)) + self.h).reshape(x.shape)


def pixelwise(T: int = 5, seed: int = 0) -> PixelwiseGamma:
    """Gammas that differ from pixel to pixel in their ends and in their shapes."""
    schedule = PixelwiseGamma(SHAPE, gamma_min=-3.0, gamma_max=3.0, T=T)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        schedule.first += 0.5 * torch.randn(SHAPE, generator=generator)
        schedule.log_span += 0.2 * torch.randn(SHAPE, generator=generator)
        schedule.raw_height += 3 + torch.randn(schedule.raw_height.shape, generator=generator)
    return schedule


SCHEDULES: dict[str, Any] = {
    "chain": lambda: CosineChain(T=5),
    "continuous": lambda: LinearGamma(-3.0, 3.0, T=5),
    "pixelwise": pixelwise,
    "exploding": lambda: VarianceExploding(pixelwise()),
}


def linear_model(schedule: Schedule, encoder: bool) -> DiffusionModel:
    return DiffusionModel(
        Linear(1, 0.3),
        schedule,
        X0Parameterization(),
        TimeConditioning(),
        FixedLargeVariance(),
        PlainGaussian(levels=256),
        clip_x0=False,
        encoder=NetworkEncoder(Linear(2, 0.5), TimeConditioning()) if encoder else None,
    ).requires_grad_(False)


def normal(square: Tensor, var: Tensor) -> float:
    """E log N over pixels, from the expected square of the difference."""
    return float(-0.5 * (torch.log(2 * math.pi * var) + square / var).sum())


def kl(square: Tensor, var_q: Tensor, var_p: Tensor) -> float:
    ratio = var_q / var_p
    return float(0.5 * (ratio - 1 - ratio.log() + square / var_p).sum())


class GivenData:
    """x_t = alpha_t m_t + e_t for one x_0, where the noise e is Markov: Cov(e_s, e_t) = alpha_t / alpha_s sigma_s^2.

    Transitions and posteriors are conditionals of this joint Gaussian, not the formulas of the forward process.
    """

    def __init__(self, model: DiffusionModel, x0: Tensor) -> None:
        self.model, self.x0, self.T = model, x0.flatten(), model.T
        times = model.grid[1:]
        gamma = torch.stack([model.schedule.gamma(t).flatten().expand(DIMS) for t in times])
        alpha, var = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma)
        if not model.schedule.preserves_variance:
            alpha, var = torch.ones_like(gamma), gamma.exp()
        self.prior_var = alpha[-1] ** 2 + var[-1]
        self.times, self.alpha, self.var = times.tolist(), alpha, var
        encoder = model.encoder
        self.m = self.x0.expand(self.T, DIMS)
        if not encoder.is_identity:
            added = torch.stack([gain @ self.x0 + h for gain, h in map(encoder.network.map, self.times)])
            self.m = self.m + torch.sigmoid(gamma) * added
        unit = torch.sqrt(alpha**2 + var)
        # the network sees x_t / unit
        maps = [model.network.map(t) for t in self.times]
        self.x0_maps = [(gain / unit[n], h) for n, (gain, h) in enumerate(maps)]

    def mean(self, n: int) -> Tensor:
        """E x_n, n in 1..T."""
        return self.alpha[n - 1] * self.m[n - 1]

    def cov(self, s: int, t: int) -> Tensor:
        """Of pixel with pixel, s <= t."""
        return self.alpha[t - 1] / self.alpha[s - 1] * self.var[s - 1]

    def step(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_n | x_{n-1}, x_0): mean = gain x_{n-1} + offset, and the variance, n in 2..T."""
        gain = self.cov(n - 1, n) / self.cov(n - 1, n - 1)
        return gain, self.mean(n) - gain * self.mean(n - 1), self.cov(n, n) - gain * self.cov(n - 1, n)

    def posterior(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_n | x_{n+1}, x_0), n in 1..T-1."""
        gain = self.cov(n, n + 1) / self.cov(n + 1, n + 1)
        return gain, self.mean(n) - gain * self.mean(n + 1), self.cov(n, n) - gain * self.cov(n, n + 1)

    def reverse(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """p(x_n | x_{n+1}), a full matrix: with beta for its variance. n = 0 is the decoder."""
        gain, offset = self.x0_maps[n]
        if n == 0:
            return gain, offset, self.var[0]
        kept = self.alpha[n] / self.alpha[n - 1]
        c_t = kept * self.var[n - 1] / self.var[n]
        var = self.var[n] - kept**2 * self.var[n - 1]
        c_0 = self.alpha[n - 1] * var / self.var[n]
        return torch.diag(c_t) + c_0[:, None] * gain, c_0 * offset, var

    def square(self, n: int, gain: Tensor, offset: Tensor) -> Tensor:
        """E (x_n - gain x_{n+1} - offset)^2 of each pixel, n in 0..T-1."""
        later = gain**2 @ self.cov(n + 1, n + 1)
        if n == 0:
            return (self.x0 - gain @ self.mean(1) - offset) ** 2 + later
        bias = self.mean(n) - gain @ self.mean(n + 1) - offset
        return bias**2 + self.cov(n, n) - 2 * gain.diagonal() * self.cov(n, n + 1) + later

    def terms(self) -> dict[str, dict[str, float]]:
        T = self.T
        reconstruction = normal(self.square(0, *self.reverse(0)[:2]), self.var[0])
        step_vars = [self.var[0], *(self.step(n)[2] for n in range(2, T + 1))]
        log_q = [normal(var, var) for var in step_vars]
        log_p = [normal(self.square(n, *self.reverse(n)[:2]), self.reverse(n)[2]) for n in range(1, T)]
        end = normal(self.mean(T) ** 2 + self.var[-1], self.prior_var)
        prior_consistency = kl(self.mean(T) ** 2 + self.var[-1] - step_vars[-1], step_vars[-1], self.prior_var)
        prior_denoising = kl(self.mean(T) ** 2, self.var[-1], self.prior_var)
        denoising = 0.0
        for n in range(1, T):
            (q_gain, q_offset, q_var), (gain, offset, var) = self.posterior(n), self.reverse(n)
            difference = torch.diag(q_gain) - gain
            bias = difference @ self.mean(n + 1) + q_offset - offset
            denoising += kl(bias**2 + difference**2 @ self.cov(n + 1, n + 1), q_var, var)
        consistency = sum(log_q[:-1]) - sum(log_p)
        return {
            "consistency": {
                "reconstruction": reconstruction,
                "prior_matching": prior_consistency,
                "consistency": consistency,
                "elbo": reconstruction - prior_consistency - consistency,
            },
            "denoising": {
                "reconstruction": reconstruction,
                "prior_matching": prior_denoising,
                "denoising_matching": denoising,
                "elbo": reconstruction - prior_denoising - denoising,
            },
            "trajectory": {
                "reconstruction": reconstruction,
                "path_log_ratio": sum(log_q) - sum(log_p) - end,
                "elbo": reconstruction + end + sum(log_p) - sum(log_q),
            },
        }

    def gap(self) -> float:
        """log p(x_0) - KL(q(x_1..x_T | x_0) || p(x_1..x_T | x_0)), from the joint Gaussian of p."""
        size = DIMS * (self.T + 1)
        mean, scale = torch.zeros(size).double(), torch.zeros(size, size).double()

        def of(n: int) -> slice:
            return slice(DIMS * n, DIMS * (n + 1))

        scale[of(self.T), of(self.T)] = torch.diag(self.prior_var.sqrt())
        for n in range(self.T - 1, -1, -1):
            gain, offset, var = self.reverse(n)
            mean[of(n)] = gain @ mean[of(n + 1)] + offset
            scale[of(n)] = gain @ scale[of(n + 1)]
            scale[of(n), of(n)] += torch.diag(var.sqrt())
        joint, d = scale @ scale.T, DIMS
        weights = joint[d:, :d] @ torch.linalg.inv(joint[:d, :d])
        posterior = torch.distributions.MultivariateNormal(
            mean[d:] + weights @ (self.x0 - mean[:d]), joint[d:, d:] - weights @ joint[:d, d:]
        )
        rows = [
            [torch.diag(self.cov(min(s, t), max(s, t))) for t in range(1, self.T + 1)] for s in range(1, self.T + 1)
        ]
        q_mean = torch.cat([self.mean(n) for n in range(1, self.T + 1)])
        q = torch.distributions.MultivariateNormal(q_mean, torch.cat([torch.cat(row, 1) for row in rows]))
        log_p = torch.distributions.MultivariateNormal(mean[:d], joint[:d, :d]).log_prob(self.x0)
        return float(log_p - torch.distributions.kl_divergence(q, posterior))


X0 = torch.tensor([0.7, -0.4, 0.1, -0.9], dtype=torch.float64).reshape(1, *SHAPE)
FORMS: list[ElboEstimator] = [
    DenoisingElbo(),
    ConsistencyElbo(),
    ConsistencyElbo(closed_entropy=True),
    TrajectoryElbo(),
]


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_oracle_by_itself(name: str, encoder: bool) -> None:
    """The three forms are one number, log p(x_0) less the KL of the posteriors."""
    given = GivenData(linear_model(SCHEDULES[name](), encoder), X0)
    bounds = [form["elbo"] for form in given.terms().values()]
    assert bounds == pytest.approx([given.gap()] * 3, rel=1e-9)


@pytest.mark.parametrize("steps", [None, 2])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "estimator", FORMS, ids=lambda e: f"{e.name}{'-closed' if vars(e).get('closed_entropy') else ''}"
)
def test_every_term_is_exact_in_expectation(estimator: ElboEstimator, name: str, steps: int | None) -> None:
    model = linear_model(SCHEDULES[name](), encoder=True)
    expected = GivenData(model, X0).terms()[estimator.name]
    estimator = type(estimator)(**{**vars(estimator), "steps": steps})
    named = estimator(model, X0.expand(30_000, -1, -1, -1), torch.Generator().manual_seed(4)).named()
    for term, value in expected.items():
        assert_mean(named[term], value, max_se=0.06)


@pytest.mark.parametrize("name", ["pixelwise", "exploding"])
def test_gammas_of_pixels_need_no_encoder(name: str) -> None:
    model = linear_model(SCHEDULES[name](), encoder=False)
    for estimator in FORMS:
        named = estimator(model, X0.expand(30_000, -1, -1, -1), torch.Generator().manual_seed(4)).named()
        for term, value in GivenData(model, X0).terms()[estimator.name].items():
            assert_mean(named[term], value, max_se=0.06)


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("name", ["continuous", "pixelwise", "exploding"])
def test_the_continuous_bound_is_the_limit_of_many_steps(name: str, encoder: bool) -> None:
    """Richardson's extrapolation of the closed form in 1 / T."""
    model = linear_model(SCHEDULES[name](), encoder)
    coarse, fine = (GivenData(model.with_steps(T), X0).terms()["denoising"] for T in (400, 800))
    limit = {term: 2 * fine[term] - coarse[term] for term in fine}
    named = ContinuousElbo(10)(model, X0.expand(10_000, -1, -1, -1), torch.Generator().manual_seed(4)).named()
    for term, value in limit.items():
        assert_mean(named["diffusion" if term == "denoising_matching" else term], value, max_se=0.05)


def unet(seed: int, **options: Any) -> UNet:
    """A network with random weights in all its layers."""
    torch.manual_seed(seed)
    network = UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=(1,), time_scale=3.0, **options)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15)
    return network


def model_of(
    encoder: Any = None, schedule: Schedule | None = None, variance: Any = None, **options: Any
) -> DiffusionModel:
    schedule = pixelwise() if schedule is None else schedule
    variance = FixedSmallVariance() if variance is None else variance
    parts = VParameterization(), GammaConditioning(), variance, CategoricalDecoder(17)
    return DiffusionModel(
        unet(0, out_channels=variance.network_outputs),
        schedule,
        *parts,
        **{"clip_x0": False, **options},
        encoder=encoder,
    )


@torch.no_grad()
@pytest.mark.parametrize("schedule", [lambda: LinearGamma(-4.0, 3.0, T=6), pixelwise], ids=["linear", "pixelwise"])
def test_the_forms_agree_for_random_networks(schedule: Any) -> None:
    model = model_of(NetworkEncoder(unet(1)), schedule(), LearnedRangeVariance())
    assert (model.encoder(model.schedule, X0.float(), model.grid[-1]) - X0).abs().min() > 0.01
    bounds = [
        form(model, X0.float().expand(4000, -1, -1, -1), torch.Generator().manual_seed(k)).total
        for k, form in enumerate(FORMS)
    ]
    for a, b in pairwise(bounds):
        se = math.sqrt(float(a.var() + b.var()) / len(a))
        assert abs(float(a.mean() - b.mean())) <= 4 * se, (a.mean(), b.mean(), se)


@torch.no_grad()
def test_the_path_and_the_trajectory_form_are_one() -> None:
    model, x0 = model_of(NetworkEncoder(unet(1))), X0.float().expand(3, -1, -1, -1)
    path = path_log_probs(model, x0, image_generators(0, range(3)))
    torch.testing.assert_close(path.elbo, TrajectoryElbo()(model, x0, image_generators(0, range(3))).total)
    assert path.gamma.shape == (model.T,)
    torch.testing.assert_close(state_bound(model, x0, 0, image_generators(0, range(3)))[0], path.elbo)


def test_the_rate_is_the_derivative() -> None:
    encoder, schedule, x0 = NetworkEncoder(unet(1).double()), pixelwise(), X0.expand(2, -1, -1, -1)
    t, h = torch.tensor([0.3, 0.8]).double(), 1e-6
    slope = (encoder(schedule, x0, t + h) - encoder(schedule, x0, t - h)) / (2 * h)
    torch.testing.assert_close(encoder.rate(schedule, x0, t), slope, rtol=1e-6, atol=1e-8)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.rate(schedule, x0, t), slope, rtol=1e-6, atol=1e-8)


def everything(model: DiffusionModel) -> list[Tensor]:
    """What the estimators and the samplers make of three images."""
    x0, found = X0.float().expand(3, -1, -1, -1), []
    for form in [*FORMS, DenoisingElbo(2), ConsistencyElbo(2), TrajectoryElbo(2), ContinuousElbo(3)]:
        found += form(model, x0, image_generators(0, range(3))).named().values()
    for sampler in (AncestralSampler(), DDIMSampler(1.0), DPMSolverSampler(sde=True)):
        found.append(sampler(model, x0, generators=image_generators(1, range(3))))
    return found


@torch.no_grad()
@pytest.mark.parametrize("schedule", [lambda: CosineChain(6), lambda: LearnedGamma(-4.0, 3.0, T=6), pixelwise])
def test_an_encoder_begins_as_the_identity_to_the_bit(schedule: Any) -> None:
    networks = UNet(1, width=8, multipliers=(1, 2), blocks=1), None
    without, identity, learned = (
        everything(model_of(encoder, schedule())) for encoder in (None, IdentityEncoder(), NetworkEncoder(networks[0]))
    )
    for a, b, c in zip(without, identity, learned, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@torch.no_grad()
def test_gammas_that_are_the_same_in_all_pixels_are_one_gamma() -> None:
    one = LearnedGamma(-4.0, 3.0, T=6, units=8)
    one.raw_height += 2 + torch.randn(8, generator=torch.Generator().manual_seed(0))
    each = PixelwiseGamma(SHAPE, -4.0, 3.0, T=6)
    assert each.pixel_shape == SHAPE and each.gamma(torch.tensor(0.3).double()).shape == (1, *SHAPE)
    each.raw_height.copy_(one.raw_height.expand_as(each.raw_height))
    for of_one, of_each in zip(everything(model_of(None, one)), everything(model_of(None, each)), strict=True):
        torch.testing.assert_close(of_each, of_one)
    x_T = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    for sampler in (DDIMSampler(), DDIMSampler(0.5), DPMSolverSampler(), HeunSampler()):
        torch.testing.assert_close(
            sampler(model_of(None, each), x_T, generators=image_generators(0, range(3))),
            sampler(model_of(None, one), x_T, generators=image_generators(0, range(3))),
        )


OBJECTIVES: dict[str, Any] = {
    "denoising": NegativeElbo(DenoisingElbo(2)),
    "consistency": NegativeElbo(ConsistencyElbo(2)),
    "continuous": NegativeElbo(ContinuousElbo(2)),
    "own": ContinuousNegativeElbo(UniformTimes()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_reach_the_encoder_and_the_gamma_of_each_pixel(name: str) -> None:
    model = model_of(NetworkEncoder(unet(1)))
    OBJECTIVES[name].check(model)
    OBJECTIVES[name](model, X0.float().expand(8, -1, -1, -1), torch.Generator().manual_seed(0)).mean().backward()
    for where, parameter in [*model.encoder.named_parameters(), *model.schedule.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), where
    assert all(
        p.grad.abs().min() > 0 for p in (model.schedule.first, model.schedule.log_span, model.schedule.raw_height)
    )
    assert model.encoder.network.stem.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_the_ancestral_sampler_draws_from_the_model() -> None:
    """Mean and variance of x_1 that the reverse steps lead to, in closed form."""
    model = linear_model(pixelwise(), encoder=True)
    given, states = GivenData(model, X0), []
    mean, cov = torch.zeros(DIMS).double(), torch.diag(given.prior_var)
    for n in range(model.T - 1, 0, -1):
        gain, offset, var = given.reverse(n)
        mean, cov = gain @ mean + offset, gain @ cov @ gain.T + torch.diag(var)
    x_T = torch.randn(20_000, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    AncestralSampler()(model, x_T, generators=torch.Generator().manual_seed(1), callback=lambda x, t: states.append(x))
    x1 = states[-2].flatten(1)
    assert ((x1.mean(0) - mean).abs() <= 4 * (cov.diagonal() / len(x1)).sqrt()).all()
    assert ((x1.var(0) / cov.diagonal() - 1).abs() <= 4 * math.sqrt(2 / len(x1))).all()


def fixed_model(**options: Any) -> DiffusionModel:
    return model_of(None, LinearGamma(T=6), **options)


def learned_model() -> DiffusionModel:
    return model_of(NetworkEncoder(unet(1)), LinearGamma(T=6))


X = torch.zeros(2, *SHAPE)
REFUSED: dict[str, tuple[Any, str]] = {
    "shape": (lambda: PixelwiseGamma([8]), "shape = [8] must be (C, H, W)"),
    "no pixels": (lambda: PixelwiseGamma([1, 0, 8]), "shape = [1, 0, 8] must be (C, H, W)"),
    "no bound": (
        lambda: NoiseMSE(UniformTimes()).check(learned_model()),
        "NetworkEncoder is learned through the bound",
    ),
    "hybrid": (
        lambda: HybridObjective(UniformTimes()).check(model_of(variance=LearnedRangeVariance())),
        "PixelwiseGamma is",
    ),
    "ddim": (lambda: DDIMSampler()(learned_model(), X), "DDIMSampler does not know of NetworkEncoder"),
    "part of ddim": (lambda: DDIMSampler(0.5)(learned_model(), X), "use AncestralSampler"),
    "solver": (lambda: DPMSolverSampler()(learned_model(), X), "with sde = true"),
    "heun": (lambda: HeunSampler()(learned_model(), X), "HeunSampler does not know"),
    "inpainting": (
        lambda: ReplacementSampler(AncestralSampler(), X, X[0] == 0)(learned_model(), X),
        "ReplacementSampler does not know",
    ),
    "flow": (lambda: ProbabilityFlow().encode(learned_model(), X), "the probability flow is that of a fixed encoder"),
    "flow of pixels": (lambda: ProbabilityFlow().encode(model_of(), X), "one noise level for all pixels"),
    "state": (lambda: state_bound(learned_model(), X, 2), "Markov only given x_0: give x0"),
    "step": (lambda: learned_model().forward_process.transition(X, 0.2, 0.4), "q(x_t | x_s) is not known"),
    "level": (lambda: DiffusionLevel(learned_model(), 2), "which a level does not know"),
    "variance": (
        lambda: model_of(variance=AnalyticVariance([0.0], [1.0])),
        "AnalyticVariance is made for a fixed encoder",
    ),
    "table": (lambda: eps_mse_table(learned_model(), [(X, {})], torch.tensor([0.5])), "it keeps its own variance"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(case: str) -> None:
    make, sentence = REFUSED[case]
    with pytest.raises(InputError) as refused:
        make()
    assert sentence in str(refused.value)
