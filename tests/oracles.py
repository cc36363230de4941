"""A world where every term of the bound is known exactly: scalar Gaussian data under the optimal linear denoiser.

Written from the definitions by moments of the joint Gaussian (x_0, ..., x_T), in float64 and without the package's
schedules, processes or estimators, so that agreement means something. Only ``oracle_model`` uses the package.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddpm_lightning.process import (
    AnalyticVariance,
    Decoder,
    DiffusionModel,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    LearnedRangeVariance,
    PlainGaussian,
    TimeConditioning,
)
from ddpm_lightning.schedules import BetaChain

Number = float | Tensor


@dataclass(frozen=True)
class ScalarGaussianWorld:
    """Data N(mean, var) and a chain of ``betas`` with the optimal denoiser.

    ``variance`` is "beta", "posterior", "optimal" (that of x_{t-1} given x_t) or "range" (``fraction`` of the way from
    posterior to beta in the logarithm).
    """

    mean: float
    var: float
    betas: list[float]
    variance: str
    fraction: float | None = None

    @property
    def T(self) -> int:
        return len(self.betas)

    @property
    def abar(self) -> list[float]:
        """alpha-bar_0 .. alpha-bar_T."""
        products = [1.0]
        for beta in self.betas:
            products.append(products[-1] * (1 - beta))
        return products

    def beta_tilde(self, t: int) -> float:
        return self.betas[t - 1] * (1 - self.abar[t - 1]) / (1 - self.abar[t])

    def reverse_var(self, t: int) -> float:
        if self.variance == "beta":
            return self.betas[t - 1]
        if self.variance == "optimal":
            # the conditional variance of the joint Gaussian (x_{t-1}, x_t)
            var_s, var_t = (self.abar[i] * self.var + 1 - self.abar[i] for i in (t - 1, t))
            return var_s - (1 - self.betas[t - 1]) * var_s**2 / var_t
        if self.fraction is not None:
            return self.betas[t - 1] ** self.fraction * self.beta_tilde(max(t, 2)) ** (1 - self.fraction)
        return self.beta_tilde(max(t, 2))

    def eps_mse(self, t: int) -> float:
        """E Var(eps | x_t)."""
        return self.abar[t] * self.var / (self.abar[t] * self.var + 1 - self.abar[t])

    def log_p(self) -> float:
        """E log p(x_0) under the data's own density."""
        return -0.5 * math.log(2 * math.pi * math.e * self.var)

    def terms(self) -> dict:
        """Exact expectations, nats a dimension, in the layout of the case files."""
        abar, betas, T = self.abar, self.betas, self.T
        m = [math.sqrt(a) * self.mean for a in abar]
        v = [a * self.var + 1 - a for a in abar]

        def x0_hat(t: int) -> tuple[float, float]:
            """E[x_0 | x_t] = gain x_t + offset."""
            gain = math.sqrt(abar[t]) * self.var / v[t]
            return gain, self.mean - gain * m[t]

        def reverse(t: int) -> tuple[float, float]:
            """Mean of p(x_{t-1} | x_t) = gain x_t + offset."""
            gain, offset = x0_hat(t)
            c0 = math.sqrt(abar[t - 1]) * betas[t - 1] / (1 - abar[t])
            ct = math.sqrt(1 - betas[t - 1]) * (1 - abar[t - 1]) / (1 - abar[t])
            return c0 * gain + ct, c0 * offset

        def square(t: int, gain: float, offset: float, var_low: float, cov: float, low: int) -> float:
            """E (x_low - gain x_t - offset)^2."""
            mean = m[low] - gain * m[t] - offset
            return mean**2 + var_low - 2 * gain * cov + gain**2 * v[t]

        def normal(square_mean: float, var: float) -> float:
            return -0.5 * (math.log(2 * math.pi * var) + square_mean / var)

        gain, offset = x0_hat(1)
        reconstruction = normal(
            square(1, gain, offset, self.var, math.sqrt(abar[1]) * self.var, 0), self.reverse_var(1)
        )
        # KL(q(x_T|x_{T-1}) || N(0, 1)) averaged over x_{T-1}
        second_moment = (1 - betas[-1]) * (m[T - 1] ** 2 + (v[T - 1] if T > 1 else self.var))
        prior_consistency = 0.5 * (betas[-1] + second_moment - 1 - math.log(betas[-1]))
        noise = 1 - abar[T]
        prior_denoising = 0.5 * (noise + abar[T] * (self.mean**2 + self.var) - 1 - math.log(noise))
        consistency = literal = denoising = 0.0
        for t in range(1, T):
            gain, offset = reverse(t + 1)
            var_p, a_next, a_t = self.reverse_var(t + 1), math.sqrt(1 - betas[t]), math.sqrt(1 - betas[t - 1])
            log_q = normal(betas[t - 1], betas[t - 1])
            consistency += log_q - normal(square(t + 1, gain, offset, v[t], a_next * v[t], t), var_p)
            # the literal KL: mean difference a_t x_{t-1} - (gain x_{t+1} + offset), variances beta_t and var_p
            var_low, cov = a_t**2 * v[t - 1], a_t**2 * a_next * v[t - 1]
            spread = square(t + 1, gain, offset, var_low, cov, t)
            ratio = betas[t - 1] / var_p
            literal += 0.5 * (ratio - 1 - math.log(ratio) + spread / var_p)
            # KL(q(x_t|x_{t+1}, x_0) || p(x_t|x_{t+1})): means differ by c0 (x_0 - x0_hat(x_{t+1}))
            c0 = math.sqrt(abar[t]) * betas[t] / (1 - abar[t + 1])
            error = self.var - abar[t + 1] * self.var**2 / v[t + 1]
            ratio = self.beta_tilde(t + 1) / var_p
            denoising += 0.5 * (ratio - 1 - math.log(ratio) + c0**2 * error / var_p)
        return by_form(reconstruction, prior_consistency, consistency, literal, prior_denoising, denoising)


def by_form(
    reconstruction: Number, prior_consistency: Number, consistency: Number, literal: Number,
    prior_denoising: Number, denoising: Number,
) -> dict:  # fmt: skip
    """The layout of the case files."""
    return {
        "reconstruction": reconstruction,
        "consistency_form": {
            "prior_matching": prior_consistency,
            "consistency": consistency,
            "elbo": reconstruction - prior_consistency - consistency,
            "consistency_literal_kl": literal,
        },
        "denoising_form": {
            "prior_matching": prior_denoising,
            "denoising_matching": denoising,
            "elbo": reconstruction - prior_denoising - denoising,
        },
    }


class OptimalEps(nn.Module):
    """The network that returns E[eps | x_t] for independent N(mean, var) pixels, given alpha-bar as t -> alpha-bar.

    With a ``fraction`` it also returns, in a second image, what LearnedRangeVariance reads as that fraction.
    """

    def __init__(self, mean: float, var: float, abar: list[float], fraction: float | None = None) -> None:
        super().__init__()
        self.mean, self.var, self.fraction = mean, var, fraction
        self.table = torch.tensor(abar, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        index = (t.double() * (len(self.table) - 1)).round().long()
        abar = self.table[index].reshape(-1, 1, 1, 1)
        total = abar * self.var + 1 - abar
        x0 = self.mean + abar.sqrt() * self.var / total * (x - abar.sqrt() * self.mean)
        eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        return eps if self.fraction is None else torch.cat([eps, torch.full_like(eps, 2 * self.fraction - 1)], 1)


def linear_betas(T: int, start: float, end: float) -> list[float]:
    """Equally spaced betas, both ends included."""
    return [start] if T == 1 else [start + (end - start) * i / (T - 1) for i in range(T)]


def respaced(world: ScalarGaussianWorld, indices: list[int]) -> ScalarGaussianWorld:
    """The world of the shorter chain that visits only ``indices`` (0 first): it owns its own betas."""
    abar = world.abar
    betas = [1 - abar[t] / abar[s] for s, t in pairwise(indices)]
    return replace(world, betas=betas)


def marginal_moments(world: ScalarGaussianWorld, t: int) -> tuple[float, float]:
    """Mean and variance of q(x_t) = E q(x_t | x_0)."""
    abar = world.abar[t]
    return math.sqrt(abar) * world.mean, abar * world.var + 1 - abar


def x0_map(world: ScalarGaussianWorld, t: int) -> tuple[float, float]:
    """E[x_0 | x_t] = gain x_t + offset."""
    mean, var = marginal_moments(world, t)
    gain = math.sqrt(world.abar[t]) * world.var / var
    return gain, world.mean - gain * mean


def reverse_map(world: ScalarGaussianWorld, t: int) -> tuple[float, float]:
    """Mean of p(x_{t-1} | x_t) = gain x_t + offset; at t = 1 the decoder's mean."""
    abar, beta = world.abar, world.betas[t - 1]
    gain, offset = x0_map(world, t)
    c0 = math.sqrt(abar[t - 1]) * beta / (1 - abar[t])
    ct = math.sqrt(1 - beta) * (1 - abar[t - 1]) / (1 - abar[t])
    return c0 * gain + ct, c0 * offset


def denoising_term(world: ScalarGaussianWorld, n: int) -> float:
    """E KL(q(x_n | x_{n+1}, x_0) || p(x_n | x_{n+1})), nats a dimension, n in 1..T-1."""
    t = n + 1
    error = world.var - x0_map(world, t)[0] ** 2 * marginal_moments(world, t)[1]  # Var(x_0 | x_t)
    c0 = math.sqrt(world.abar[n]) * world.betas[n] / (1 - world.abar[t])
    ratio = world.beta_tilde(t) / world.reverse_var(t)
    return 0.5 * (ratio - 1 - math.log(ratio) + c0**2 * error / world.reverse_var(t))


def draw_data(world: ScalarGaussianWorld, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float64 images of independent N(mean, var) pixels."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return world.mean + math.sqrt(world.var) * noise


def oracle_model(
    world: ScalarGaussianWorld, *, clip_x0: bool = False, decoder: Decoder | None = None
) -> DiffusionModel:
    """The package's model of this world, under the optimal denoiser."""
    gammas = [math.log(1 / abar - 1) for abar in world.abar[1:]]
    variances = {
        "beta": FixedLargeVariance(),
        "posterior": FixedSmallVariance(),
        "optimal": AnalyticVariance(gammas, [world.eps_mse(t) for t in range(1, world.T + 1)]),
        "range": LearnedRangeVariance(),
    }
    return DiffusionModel(
        network=OptimalEps(world.mean, world.var, world.abar, world.fraction),
        schedule=BetaChain(world.betas),
        parameterization=EpsParameterization(),
        conditioning=TimeConditioning(),
        variance=variances[world.variance],
        decoder=PlainGaussian(levels=256) if decoder is None else decoder,
        clip_x0=clip_x0,
    )


def assert_mean(values: Tensor, expected: float, *, max_se: float = math.inf, k: float = 4.0) -> None:
    """Independent ``values`` have this mean within k standard errors, and these are small enough to tell."""
    values = values.detach().double().flatten()
    mean, se = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    assert se <= max_se, f"standard error {se:.3g} is too large to test {expected:.6g}"
    assert abs(mean - expected) <= k * se + 1e-9 * max(1.0, abs(expected)), f"{mean} +- {se}, expected {expected}"


def assert_moments(values: Tensor, mean: float, var: float, *, k: float = 4.0) -> None:
    """Independent Gaussian ``values`` have this mean and variance within k standard errors."""
    values = values.detach().double().flatten()
    n = len(values)
    assert abs(float(values.mean()) - mean) <= k * math.sqrt(var / n) + 1e-9, f"mean {float(values.mean())}, not {mean}"
    assert abs(float(values.var()) - var) <= k * var * math.sqrt(2 / n) + 1e-9, f"var {float(values.var())}, not {var}"


def assert_covariance(x: Tensor, mean: Tensor, cov: Tensor, allowance: float = 0.0) -> None:
    """Gaussian events ``[N, D]`` have this mean and covariance within 4 standard errors and an absolute allowance."""
    n, variances = len(x), cov.diagonal()
    mean_se = torch.sqrt(variances / n)
    cov_se = torch.sqrt((variances[:, None] * variances + cov**2) / n)
    assert bool(((x.mean(0) - mean).abs() <= 4 * mean_se + allowance).all()), (x.mean(0), mean, mean_se)
    assert bool(((x.T.cov() - cov).abs() <= 4 * cov_se + allowance).all()), (x.T.cov(), cov, cov_se)


def state_bound_mean(world: ScalarGaussianWorld, n: int, x: float) -> float:
    """The exact bound on log p(x_n = x): x_m given x_n is N(sqrt(abar_m/abar_n) x, 1 - abar_m/abar_n)."""
    kept = [a / world.abar[n] for a in world.abar]
    second_moment = kept[-1] * x**2 + 1 - kept[-1]
    total = -0.5 * (math.log(2 * math.pi) + second_moment)
    for m in range(n + 1, world.T + 1):
        gain, offset = reverse_map(world, m)
        mean, var = math.sqrt(kept[m - 1]) * x, 1 - kept[m - 1]
        square = (mean - gain * math.sqrt(kept[m]) * x - offset) ** 2
        square += var - 2 * gain * math.sqrt(1 - world.betas[m - 1]) * var + gain**2 * (1 - kept[m])
        total += 0.5 * (math.log(world.betas[m - 1]) + 1)
        total -= 0.5 * (math.log(world.reverse_var(m)) + square / world.reverse_var(m))
    return total


def model_moments(world: ScalarGaussianWorld, n: int) -> tuple[float, float]:
    """Mean and variance of the model's own p(x_n), from N(0, 1) down through its reverse steps."""
    mean, var = 0.0, 1.0
    for m in range(world.T, n, -1):
        gain, offset = reverse_map(world, m)
        mean, var = gain * mean + offset, gain**2 * var + world.reverse_var(m)
    return mean, var


def normal_log_prob(x: float, mean: float, var: float) -> float:
    """log N(x; mean, var)."""
    return -0.5 * (math.log(2 * math.pi * var) + (x - mean) ** 2 / var)
