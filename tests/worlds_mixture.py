"""Mixtures of Gaussians: a nonlinear optimal denoiser in closed form, and its error by quadrature."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from worlds_chain import Variances, World, gammas_of_betas


class MixtureWorld(World):
    """Data sum_k weights_k N(means_k, stds_k^2 I): ``weights`` ``[K]``, ``means`` ``[K]`` or ``[K, D]``, ``stds`` one
    or ``[K]``.

    Errors, and with them the terms of the bound, are known by quadrature over one variable: in one dimension, or where
    the means lie on a line and the standard deviations are equal, when the other directions are Gaussian.
    """

    def __init__(
        self,
        weights: Sequence[float],
        means: Sequence[float] | Sequence[Sequence[float]],
        stds: float | Sequence[float],
    ) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.weights = self.weights / self.weights.sum()
        self.means = torch.tensor(means, dtype=torch.float64).reshape(len(weights), -1)
        self.var = (torch.as_tensor(stds, dtype=torch.float64) ** 2).expand(len(weights))
        self.dims = self.means.shape[1]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dims, generator=generator, dtype=torch.float64)
        return self.means[component] + self.var[component, None].sqrt() * noise

    def _joint_log_prob(self, x_t: Tensor, alpha: Tensor, sigma2: Tensor) -> Tensor:
        """log(weight_k q(x_t | k)), ``[..., K]``."""
        var = alpha**2 * self.var + sigma2
        # |x_t - alpha m|^2 multiplied out: no tensor of [..., K, dims]
        square = x_t.square().sum(-1, keepdim=True) - 2 * alpha * (x_t @ self.means.T)
        square = square + alpha**2 * self.means.square().sum(1)
        return (torch.log(self.weights) - 0.5 * self.dims * torch.log(2 * math.pi * var)) - 0.5 * square / var

    def log_prob(self, x_t: Tensor, alpha: Tensor | float = 1.0, sigma2: Tensor | float = 0.0) -> Tensor:
        """log q(x_t) for x_t ``[..., dims]``: ``[...]``. By default log p(x_0)."""
        return torch.logsumexp(self._joint_log_prob(x_t, _as_scale(alpha), _as_scale(sigma2)), -1)

    def responsibilities(self, x_t: Tensor, alpha: Tensor, sigma2: Tensor) -> Tensor:
        """P(k | x_t), ``[..., K]``."""
        return torch.softmax(self._joint_log_prob(x_t, alpha, sigma2), -1)

    def x0_mean(self, x_t: Tensor, alpha: Tensor, sigma2: Tensor) -> Tensor:
        # component k: E[x_0 | x_t, k] = (1 - gain_k alpha) mean_k + gain_k x_t
        gain = alpha * self.var / (alpha**2 * self.var + sigma2)
        responsibility = self.responsibilities(x_t, alpha, sigma2)
        pulled = (responsibility * (1 - gain * alpha)) @ self.means
        return pulled + (responsibility * gain).sum(-1, keepdim=True) * x_t

    def score(self, x_t: Tensor, alpha: Tensor | float, sigma2: Tensor | float) -> Tensor:
        """Gradient of log q(x_t) in x_t, by components: ``[..., dims]``."""
        alpha, sigma2 = _as_scale(alpha), _as_scale(sigma2)
        responsibility = self.responsibilities(x_t, alpha, sigma2)
        pull = (alpha[..., None] * self.means - x_t[..., None, :]) / (alpha**2 * self.var + sigma2)[..., None]
        return (responsibility[..., None] * pull).sum(-2)

    def cdf(self, x_t: Tensor, alpha: Tensor | float = 1.0, sigma2: Tensor | float = 0.0) -> Tensor:
        """P(X_t <= x_t) in one dimension, shape of ``x_t``."""
        alpha, sigma2 = _as_scale(alpha), _as_scale(sigma2)
        std = torch.sqrt(alpha**2 * self.var + sigma2)
        return torch.special.ndtr((x_t[..., None] - alpha * self.means[:, 0]) / std) @ self.weights

    def quantile(self, probability: Tensor) -> Tensor:
        """Inverse of :meth:`cdf` of the data, by bisection."""
        reach = 10 * float(self.var.max().sqrt())
        low = torch.full_like(probability, float(self.means.min()) - reach)
        high = torch.full_like(probability, float(self.means.max()) + reach)
        for _ in range(60):
            middle = 0.5 * (low + high)
            below = self.cdf(middle) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)

    def mean(self) -> Tensor:
        """E x_0, ``[dims]``."""
        return self.weights @ self.means

    def square(self) -> float:
        return float(self.weights @ (self.means.square().sum(1) + self.dims * self.var))

    def _along_the_line(self) -> tuple["MixtureWorld", float]:
        """The world along the line through the means, and the variance of each of the other directions."""
        if self.dims == 1:
            return self, 0.0
        directions = self.means - self.means[0]
        axis = directions[directions.norm(dim=1).argmax()]
        axis = axis / axis.norm()
        along = directions @ axis
        if not torch.allclose(along[:, None] * axis, directions) or bool((self.var != self.var[0]).any()):
            raise ValueError("quadrature needs means on a line and equal standard deviations")
        world = MixtureWorld(self.weights.tolist(), along.tolist(), float(self.var[0].sqrt()))
        return world, float(self.var[0])

    def _expectation(self, value: Callable[[Tensor], Tensor], alpha: Tensor, sigma2: Tensor) -> Tensor:
        """E value(x_t) in one dimension for scales ``[N]``: ``[N]``; ``value`` maps ``[N, M, 1]`` to ``[N, M]``.

        The trapezoidal rule on each component: exponentially accurate for what is analytic in a strip.
        """
        z = torch.linspace(-9, 9, 721, dtype=torch.float64)
        density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
        total = torch.zeros_like(alpha)
        for weight, mean, var in zip(self.weights, self.means[:, 0], self.var, strict=True):
            std = torch.sqrt(alpha**2 * var + sigma2)
            total = total + weight * value(((alpha * mean)[:, None] + std[:, None] * z)[..., None]) @ density
        return total

    def error(self, alpha: Tensor, sigma2: Tensor) -> Tensor:
        line, across = self._along_the_line()

        def conditional_var(x_t: Tensor) -> Tensor:
            """Within the components and between them."""
            scale, noise = alpha[:, None, None], sigma2[:, None, None]
            total = scale**2 * line.var + noise
            means = line.means[:, 0] + scale * line.var / total * (x_t - scale * line.means[:, 0])
            responsibility = line.responsibilities(x_t, scale, noise)
            middle = (responsibility * means).sum(-1, keepdim=True)
            return (responsibility * (noise * line.var / total + (means - middle).square())).sum(-1)

        rest = sigma2 * across / (alpha**2 * across + sigma2)
        return line._expectation(conditional_var, alpha, sigma2) + (self.dims - 1) * rest

    def log_p(self) -> float:
        line, across = self._along_the_line()
        one = torch.ones(1, dtype=torch.float64)
        value = float(line._expectation(line.log_prob, one, 0 * one))
        return value if self.dims == 1 else value - 0.5 * (self.dims - 1) * math.log(2 * math.pi * math.e * across)


def _as_scale(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class LearnedScheduleProblem:
    """Which gammas give the mixture's best bound at T states? ``fixed`` holds those of the usual schedules by name."""

    world: MixtureWorld
    variance: Variances
    fixed: dict[str, list[float]]

    def bound(self, gammas: Sequence[float] | Tensor) -> Tensor:
        """The exact bound, nats an event, under the optimal denoiser; differentiable in ``gammas`` ``[T]``."""
        return self.world.exact_bound(gammas, self.variance)

    def best_fixed(self) -> tuple[str, float]:
        """Name and bound of the best of the fixed schedules."""
        return max(((name, float(self.bound(gammas))) for name, gammas in self.fixed.items()), key=lambda pair: pair[1])

    def optimum(self, start: str, iterations: int = 60) -> Tensor:
        """The gammas of a local optimum, by ascent from a fixed schedule over all increasing gammas."""
        gammas = torch.tensor(self.fixed[start], dtype=torch.float64)
        first = gammas[:1].clone().requires_grad_()
        log_increments = gammas.diff().log().requires_grad_()

        def current() -> Tensor:
            return torch.cat([first, first + log_increments.exp().cumsum(0)])

        optimizer = torch.optim.LBFGS([first, log_increments], max_iter=iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -self.bound(current())
            loss.backward()
            return loss

        optimizer.step(closure)
        return current().detach()


def learned_schedule_problem(T: int = 8, variance: Variances = "beta") -> LearnedScheduleProblem:
    """Three well separated peaks, for which where the few steps go matters."""
    abar = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
    betas = [0.02 + 0.78 * i / (T - 1) for i in range(T)]
    return LearnedScheduleProblem(
        world=MixtureWorld([0.3, 0.5, 0.2], [-0.8, 0.1, 0.7], [0.08, 0.15, 0.05]),
        variance=variance,
        fixed={
            "linear betas": gammas_of_betas(betas),
            "cosine betas": gammas_of_betas([min(1 - abar[i + 1] / abar[i], 0.999) for i in range(T)]),
            "linear gamma": [-13.3 + 18.3 * i / (T - 1) for i in range(T)],
            "linear gamma, narrow": [-7.0 + 12.0 * i / (T - 1) for i in range(T)],
        },
    )
