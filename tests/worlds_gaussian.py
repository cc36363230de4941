"""Correlated Gaussian data: every term of the bound, and every moment of a sampler's states, by full matrices.

Written from the joint covariances of (x_0, ..., x_T), without the shortcuts of ``worlds_chain.World.terms``.
"""

import math

import torch
from oracles import by_form
from torch import Tensor
from worlds_chain import Chain, Terms, Variances, World, expected_kl, expected_log_normal


class CorrelatedGaussianWorld(World):
    """Data N(mean, cov): ``mean`` ``[D]``, ``cov`` ``[D, D]``."""

    def __init__(self, mean: list[float] | Tensor, cov: list[list[float]] | Tensor) -> None:
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.cov = torch.as_tensor(cov, dtype=torch.float64)
        self.dims = len(self.mean)
        self.eye = torch.eye(self.dims, dtype=torch.float64)
        self.values, self.vectors = torch.linalg.eigh(self.cov)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, self.dims, generator=generator, dtype=torch.float64)
        return self.mean + noise @ torch.linalg.cholesky(self.cov).T

    def x0_mean(self, x_t: Tensor, alpha: Tensor, sigma2: Tensor) -> Tensor:
        gains = alpha * self.values / (alpha**2 * self.values + sigma2)
        return self.mean + ((x_t - alpha * self.mean) @ self.vectors * gains) @ self.vectors.T

    def log_p(self) -> float:
        return float(-0.5 * torch.logdet(2 * math.pi * math.e * self.cov))

    def square(self) -> float:
        return float(torch.trace(self.cov) + self.mean @ self.mean)

    def error(self, alpha: Tensor, sigma2: Tensor) -> Tensor:
        return (sigma2[:, None] * self.values / (alpha[:, None] ** 2 * self.values + sigma2[:, None])).sum(1)

    def posterior(self, operator: Tensor, y: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean ``[..., D]`` and covariance ``[D, D]`` of x_0 given y = operator x_0 + noise.

        Args:
            operator: ``[M, D]``; rows of the identity for some of the pixels.
            y: ``[..., M]``.
            noise: covariance ``[M, M]``, or one variance for all of y (0 too, for independent rows).
        """
        noise_cov = torch.as_tensor(noise, dtype=torch.float64)
        if noise_cov.ndim == 0:
            noise_cov = noise_cov * torch.eye(len(operator), dtype=torch.float64)
        gain = torch.linalg.solve(operator @ self.cov @ operator.T + noise_cov, operator @ self.cov).T
        return self.mean + (y - operator @ self.mean) @ gain.T, self.cov - gain @ operator @ self.cov

    def joint(self, chain: Chain, s: int, t: int) -> Tensor:
        """Cov(x_s, x_t), ``[D, D]``, for s <= t."""
        noise = chain.sigma2[s] * chain.alpha[t] / chain.alpha[s]
        return chain.alpha[s] * chain.alpha[t] * self.cov + noise * self.eye

    def x0_map(self, chain: Chain, n: int) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_n] = gain x_n + offset."""
        gain = torch.linalg.solve(self.joint(chain, n, n), chain.alpha[n] * self.cov).T
        return gain, self.mean - chain.alpha[n] * gain @ self.mean

    def reverse_map(self, chain: Chain, n: int) -> tuple[Tensor, Tensor]:
        """Mean of p(x_n | x_{n+1}) = gain x_{n+1} + offset; the decoder's mean at n = 0."""
        _, _, c0, ct, _ = chain.between(1)
        gain, offset = self.x0_map(chain, n + 1)
        return c0[n] * gain + ct[n] * self.eye, c0[n] * offset

    def terms(self, chain: Chain, variance: Variances) -> Terms:
        dims, T, prior_var = self.dims, chain.T, chain.prior_var
        one, zero, none = self.eye.new_ones(()), self.eye.new_zeros(dims, dims), torch.zeros_like(self.mean)
        ratio, var, c0, _, posterior_var = chain.between(1)
        reverse_var = self.reverse_vars(chain, variance)

        def square(scale: Tensor, s: int, gain: Tensor, offset: Tensor, t: int) -> Tensor:
            """E |scale x_s - gain x_t - offset|^2, s <= t."""
            mean = (scale * chain.alpha[s] * self.eye - chain.alpha[t] * gain) @ self.mean - offset
            cross = gain @ self.joint(chain, s, t).T
            cov = scale**2 * self.joint(chain, s, s) - 2 * scale * cross + gain @ self.joint(chain, t, t) @ gain.T
            return torch.trace(cov) + mean @ mean

        reconstruction = expected_log_normal(dims, square(one, 0, *self.x0_map(chain, 1), 1), reverse_var[0])
        prior_consistency = expected_kl(dims, square(ratio[-1], T - 1, zero, none, T), var[-1], prior_var)
        prior_denoising = expected_kl(dims, square(chain.alpha[-1], 0, zero, none, T), chain.sigma2[-1], prior_var)
        consistency = literal = denoising = path = torch.zeros_like(one)
        for n in range(T):
            path = path + expected_log_normal(dims, dims * var[n], var[n])
        path = path - expected_log_normal(dims, square(one, T, zero, none, T), prior_var)
        for n in range(1, T):
            log_q = expected_log_normal(dims, dims * var[n - 1], var[n - 1])
            log_p = expected_log_normal(dims, square(one, n, *self.reverse_map(chain, n), n + 1), reverse_var[n])
            consistency, path = consistency + log_q - log_p, path - log_p
            spread = square(ratio[n - 1], n - 1, *self.reverse_map(chain, n), n + 1)
            literal = literal + expected_kl(dims, spread, var[n - 1], reverse_var[n])
            error = square(one, 0, *self.x0_map(chain, n + 1), n + 1)
            denoising = denoising + expected_kl(dims, c0[n] ** 2 * error, posterior_var[n], reverse_var[n])
        forms = by_form(reconstruction, prior_consistency, consistency, literal, prior_denoising, denoising)
        return {**forms, "trajectory_form": {"path_log_ratio": path, "elbo": reconstruction - path}}

    def ancestral_moments(self, chain: Chain, variance: Variances) -> list[tuple[Tensor, Tensor]]:
        """Mean and covariance of the ancestral sampler's x_T, ..., x_1 and image, exact at any T."""
        reverse_var = self.reverse_vars(chain, variance)
        moments = [(torch.zeros_like(self.mean), chain.prior_var * self.eye)]
        for n in range(chain.T - 1, -1, -1):
            # the last step is the decoder's mode and adds no noise
            noise = reverse_var[n] if n > 0 else torch.zeros_like(reverse_var[0])
            moments.append(_pushed(moments[-1], *self.reverse_map(chain, n), noise))
        return moments

    def ddim_moments(self, chain: Chain, eta: float) -> list[tuple[Tensor, Tensor]]:
        """Mean and covariance of DDIM's x_T, ..., x_1 and image, exact at any T."""
        _, _, _, _, posterior_var = chain.between(1)
        moments = [(torch.zeros_like(self.mean), chain.prior_var * self.eye)]
        for n in range(chain.T - 1, -1, -1):
            gain, offset = self.x0_map(chain, n + 1)
            noise = eta**2 * posterior_var[n]
            per_eps = torch.sqrt((chain.sigma2[n] - noise) / chain.sigma2[n + 1])
            direct = chain.alpha[n] - per_eps * chain.alpha[n + 1]
            moments.append(_pushed(moments[-1], direct * gain + per_eps * self.eye, direct * offset, noise))
        return moments


def _pushed(moments: tuple[Tensor, Tensor], gain: Tensor, offset: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    mean, cov = moments
    return gain @ mean + offset, gain @ cov @ gain.T + noise * torch.eye(len(mean), dtype=mean.dtype)
