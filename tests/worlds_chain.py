"""Exact expectations of every term of the bound in any world whose error under the optimal denoiser is known.

Under the optimal denoiser x0-hat = E[x_0 | x_t] and isotropic reverse variances, all three forms need of the data only
their dimension, E |x_0|^2 and the error E |x_0 - x0-hat(x_t)|^2 at each state. Written from the definitions in float64,
without the package's schedules, processes or estimators; only ``optimal_model`` uses the package. Everything is
differentiable in the chain's gammas.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from numpy.polynomial.legendre import leggauss
from oracles import by_form
from torch import Tensor, nn

from ddpm_lightning.process import (
    DiffusionModel,
    EpsParameterization,
    FixedLargeVariance,
    GammaConditioning,
    Parameterization,
    PlainGaussian,
    ReverseVariance,
    ScoreParameterization,
    VParameterization,
    X0Parameterization,
)
from ddpm_lightning.schedules import Schedule

Variances = str | Sequence[float] | Tensor
"""Of p(x_n | x_{n+1}), n = 0..T-1, the decoder first: "beta", "posterior", "range" (between the two), "optimal" (the
isotropic variances of the highest bound), or T values."""

Terms = dict[str, Tensor | dict[str, Tensor]]


def preserving(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma^2 with alpha^2 + sigma^2 = 1."""
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma)


def exploding(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """alpha = 1 and sigma^2 = exp(gamma)."""
    return torch.ones_like(gamma), torch.exp(gamma)


Scales = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Chain:
    """States q(x_n | x_0) = N(alpha_n x_0, sigma2_n I), n = 0..T, and the prior N(0, prior_var I) of x_T.

    Entry n of what belongs to a step, ``[T]``, is that of x_n -> x_{n+1}.
    """

    alpha: Tensor
    sigma2: Tensor
    prior_var: Tensor

    @property
    def T(self) -> int:
        return len(self.alpha) - 1

    def between(self, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of q(x_{n+stride} | x_n) = N(ratio x_n, var) and q(x_n | x_{n+stride}, x_0) = N(c0 x_0 + ct x_{n+stride},
        posterior_var), by Bayes' rule: ratio, var, c0, ct, posterior_var."""
        alpha, sigma2 = self.alpha[:-stride], self.sigma2[:-stride]
        ratio = self.alpha[stride:] / alpha
        var = self.sigma2[stride:] - ratio**2 * sigma2
        total = var + ratio**2 * sigma2
        return ratio, var, alpha * var / total, ratio * sigma2 / total, var * sigma2 / total


def chain_of(gammas: Sequence[float] | Tensor, scales: Scales = preserving, prior_var: float = 1.0) -> Chain:
    """The chain whose states x_1, ..., x_T have -log SNR ``gammas``."""
    gamma = torch.as_tensor(gammas, dtype=torch.float64)
    alpha, sigma2 = scales(gamma)
    return Chain(
        torch.cat([alpha.new_ones(1), alpha]), torch.cat([sigma2.new_zeros(1), sigma2]), alpha.new_tensor(prior_var)
    )


def gammas_of_betas(betas: Sequence[float]) -> list[float]:
    """-log SNR of the states of a chain of ``betas``."""
    neg_log_abar, gammas = 0.0, []
    for beta in betas:
        neg_log_abar -= math.log1p(-beta)
        gammas.append(math.log(math.expm1(neg_log_abar)))
    return gammas


def expected_log_normal(dims: int, square: Tensor, var: Tensor) -> Tensor:
    """E log N(x; mean, var I) where E |x - mean|^2 = ``square``."""
    return -0.5 * (dims * torch.log(2 * math.pi * var) + square / var)


def expected_kl(dims: int, square: Tensor, var_q: Tensor, var_p: Tensor) -> Tensor:
    """E KL(N(m_q, var_q I) || N(m_p, var_p I)) where E |m_q - m_p|^2 = ``square``."""
    ratio = var_q / var_p
    return 0.5 * (dims * (ratio - 1 - torch.log(ratio)) + square / var_p)


class World:
    """A distribution of events x_0 in ``dims`` dimensions. An image ``[C, H, W]`` is made of independent events, each
    of ``dims`` consecutive pixels. All expectations are nats an event."""

    dims: int

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Events, float64 ``[count, dims]``."""
        raise NotImplementedError

    def x0_mean(self, x_t: Tensor, alpha: Tensor, sigma2: Tensor) -> Tensor:
        """E[x_0 | x_t] for x_t ``[..., dims]``; ``alpha``, ``sigma2`` broadcast against it."""
        raise NotImplementedError

    def log_p(self) -> float:
        """E log p(x_0), minus the entropy."""
        raise NotImplementedError

    def square(self) -> float:
        """E |x_0|^2."""
        raise NotImplementedError

    def error(self, alpha: Tensor, sigma2: Tensor) -> Tensor:
        """E |x_0 - E[x_0 | x_t]|^2 for scales ``[N]``: ``[N]``."""
        raise NotImplementedError

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Images, float64 ``[B, C, H, W]``."""
        return self.sample(math.prod(shape) // self.dims, generator).reshape(shape)

    def reverse_vars(self, chain: Chain, variance: Variances) -> Tensor:
        """Variances of p(x_n | x_{n+1}), n = 0..T-1, ``[T]``."""
        _, var, c0, _, posterior_var = chain.between(1)
        if not isinstance(variance, str):
            return torch.as_tensor(variance, dtype=torch.float64)
        if variance == "beta":
            return var
        if variance == "posterior":  # beta-tilde_1 := beta-tilde_2
            return torch.cat([posterior_var[1:2], posterior_var[1:]])
        if variance == "range":  # 0.3 of the way from beta-tilde to beta, in the logarithm
            small = torch.cat([posterior_var[1:2], posterior_var[1:]])
            return var**0.3 * small**0.7
        if variance == "optimal":
            return posterior_var + c0**2 * self.error(chain.alpha[1:], chain.sigma2[1:]) / self.dims
        raise ValueError(variance)

    def terms(self, chain: Chain, variance: Variances) -> Terms:
        """Exact expectations in the layout of ``ScalarGaussianWorld.terms``, and ``trajectory_form``."""
        dims, square = self.dims, self.square()
        errors = self.error(chain.alpha[1:], chain.sigma2[1:])
        ratio, var, c0, ct, posterior_var = chain.between(1)
        reverse_var = self.reverse_vars(chain, variance)
        energy = chain.alpha**2 * square + dims * chain.sigma2  # E |x_n|^2
        reconstruction = expected_log_normal(dims, errors[0], reverse_var[0])
        prior_consistency = expected_kl(dims, ratio[-1] ** 2 * energy[-2], var[-1], chain.prior_var)
        prior_denoising = expected_kl(dims, chain.alpha[-1] ** 2 * square, chain.sigma2[-1], chain.prior_var)
        log_q = expected_log_normal(dims, dims * var, var)
        # the reverse mean is E[x_n | x_{n+1}], so its error is the conditional variance
        spread = dims * posterior_var[1:] + c0[1:] ** 2 * errors[1:]
        log_p = expected_log_normal(dims, spread, reverse_var[1:])
        consistency = (log_q[:-1] - log_p).sum()
        denoising = expected_kl(dims, c0[1:] ** 2 * errors[1:], posterior_var[1:], reverse_var[1:]).sum()
        path = log_q.sum() - log_p.sum() - expected_log_normal(dims, energy[-1], chain.prior_var)
        literal = reconstruction.new_zeros(())
        if chain.T > 1:
            # means ratio x_{n-1} and E[x_n|x_{n+1}] = c0 h + ct y: with E[x_{n-1}|x_{n+1}] = far0 h + fart y all of it
            # are moments of y = x_{n+1} and h = x0-hat(y), for which E h y = E x_0 y and E h h = E x_0 h
            _, _, far0, fart, _ = chain.between(2)
            near0, neart, a = c0[1:], ct[1:], ratio[:-1]
            hh, hy, yy = square - errors[1:], chain.alpha[2:] * square, energy[2:]
            cross = far0 * near0 * hh + (far0 * neart + fart * near0) * hy + fart * neart * yy
            reverse = near0**2 * hh + 2 * near0 * neart * hy + neart**2 * yy
            apart = a**2 * energy[:-2] - 2 * a * cross + reverse
            literal = expected_kl(dims, apart, var[:-1], reverse_var[1:]).sum()
        forms = by_form(reconstruction, prior_consistency, consistency, literal, prior_denoising, denoising)
        return {**forms, "trajectory_form": {"path_log_ratio": path, "elbo": reconstruction - path}}

    def exact_bound(self, gammas: Sequence[float] | Tensor, variance: Variances = "beta") -> Tensor:
        """The bound of the variance-preserving chain whose states have -log SNR ``gammas``; differentiable in them."""
        terms = self.terms(chain_of(gammas), variance)["denoising_form"]
        assert isinstance(terms, dict)
        return terms["elbo"]

    def diffusion(self, first: float, last: float, nodes: int = 20, parts: int = 10) -> float:
        """1/2 int exp(-gamma) error(gamma) d gamma, the cost of infinitely many steps, by Gauss-Legendre."""
        points, weights = (torch.from_numpy(values) for values in leggauss(nodes))
        width = (last - first) / parts
        starts = first + width * torch.arange(parts, dtype=torch.float64)
        gamma = (starts[:, None] + 0.5 * width * (points + 1)).flatten()
        values = 0.5 * torch.exp(-gamma) * self.error(*preserving(gamma))
        return float((values.reshape(parts, nodes) @ weights).sum() * 0.5 * width)


OUTPUTS: dict[type[Parameterization], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    EpsParameterization: lambda x0, eps, alpha, sigma: eps,
    X0Parameterization: lambda x0, eps, alpha, sigma: x0,
    VParameterization: lambda x0, eps, alpha, sigma: (alpha * eps - sigma * x0) / torch.hypot(alpha, sigma),
    ScoreParameterization: lambda x0, eps, alpha, sigma: -eps / sigma,
}
"""What a network returns that knows E[x_0 | x_t] and E[eps | x_t]."""


class OptimalNetwork(nn.Module):
    """The optimal denoiser of a world at any noise level, told ``c`` with gamma = ``gamma_of(c)``, and x_t divided by
    sqrt(alpha^2 + sigma^2). With a ``fraction`` it returns that of the learned range too, as 2 fraction - 1."""

    def __init__(
        self,
        world: World,
        output: type[Parameterization],
        gamma_of: Callable[[Tensor], Tensor],
        scales: Scales = preserving,
        fraction: float | None = None,
    ) -> None:
        super().__init__()
        self.world, self.output, self.gamma_of, self.scales = world, OUTPUTS[output], gamma_of, scales
        self.fraction = fraction

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        alpha, sigma2 = (scale.reshape(-1, 1, 1) for scale in self.scales(self.gamma_of(c.double())))
        x_t = (alpha**2 + sigma2).sqrt() * x.double().reshape(len(x), -1, self.world.dims)
        x0 = self.world.x0_mean(x_t, alpha, sigma2)
        eps = (x_t - alpha * x0) / sigma2.sqrt()
        output = self.output(x0, eps, alpha, sigma2.sqrt()).reshape(x.shape).to(x.dtype)
        if self.fraction is None:
            return output
        return torch.cat([output, torch.full_like(x, 2 * self.fraction - 1)], 1)


def optimal_model(
    world: World,
    schedule: Schedule,
    parameterization: Parameterization | None = None,
    variance: ReverseVariance | None = None,
    scales: Scales = preserving,
    fraction: float = 0.3,
) -> DiffusionModel:
    """The package's model of this world under the optimal denoiser, by default of eps with the variance beta. A learned
    variance is given ``fraction``."""
    variance = FixedLargeVariance() if variance is None else variance
    learned = fraction if variance.network_outputs == 2 else None
    parameterization = EpsParameterization() if parameterization is None else parameterization
    conditioning = GammaConditioning()
    return DiffusionModel(
        network=OptimalNetwork(world, type(parameterization), lambda c: c * conditioning.scale, scales, learned),
        schedule=schedule,
        parameterization=parameterization,
        conditioning=conditioning,
        variance=variance,
        decoder=PlainGaussian(levels=256),
        clip_x0=False,
    )
