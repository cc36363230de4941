r"""The probability-flow ODE (Song et al. 2021, arXiv 2011.13456, section 4.3): an invertible map between states, and
the density that it gives them.

Take units in which alpha^2 + sigma^2 = 1: z = x / n with n^2 = alpha^2 + sigma^2, a = alpha / n and s = sigma / n. For
any schedule the ODE in gamma = -log SNR, and the change of the density along it, are

.. math::

    \frac{dz}{d\gamma} = \tfrac12 a s v, \quad v = a \hat\epsilon - s \hat x_0,
        \qquad \frac{d \log p(z)}{d\gamma} = -\nabla_z \cdot \frac{dz}{d\gamma}

so with the prior at t = 1 and the first state x_1

.. math::

    \log p(x_1) = \log p(x_T) + D \log \frac{n_T}{n_1} +
        \int_{\gamma_1}^{\gamma_T} \nabla_z \cdot (\tfrac12 a s v) \, d\gamma

The field is smooth in gamma and nearly vanishes towards low noise. So Runge-Kutta's rule of order 4 on equal steps in
gamma, in float64, does what an adaptive solver would do. Every image takes the same number of evaluations, and the
density of an image does not depend on its batch. Compare ``steps`` with twice as many to see the error that is left.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.ops import Generators, as_times, expand_to, randn_like, sum_per_image
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.schedules import logsnr_grid

__all__ = ["Divergence", "ExactDivergence", "FlowLikelihood", "HutchinsonDivergence", "ProbabilityFlow"]

_Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z, t) -> dz/d gamma ``[B, C, H, W]`` and its divergence ``[B]``."""


class Divergence:
    """The trace of the field's Jacobian, as sum_k e_k . J e_k with the vectors e_k of a subclass."""

    def vectors(self, z: Tensor, generators: Generators = None) -> Tensor:
        """e_k, ``[K, B or 1, C, H, W]``, with sum_k e_k e_k^T = I in expectation; the same ones all along the path."""
        raise NotImplementedError


class ExactDivergence(Divergence):
    """Every dimension in turn: D backward passes for each evaluation of the network."""

    def vectors(self, z: Tensor, generators: Generators = None) -> Tensor:
        dims = z[0].numel()
        return torch.eye(dims, dtype=z.dtype, device=z.device).reshape(dims, 1, *z.shape[1:])


class HutchinsonDivergence(Divergence):
    """``probes`` vectors of random signs for each image (Hutchinson 1990), each with one backward pass for each
    evaluation: an unbiased estimate of the log density.
    """

    def __init__(self, probes: int = 1) -> None:
        at_least(1, probes=probes)
        self.probes = probes

    def vectors(self, z: Tensor, generators: Generators = None) -> Tensor:
        draws = torch.stack([randn_like(z, generators) for _ in range(self.probes)])
        return torch.where(draws < 0, -1.0, 1.0).to(z.dtype) / self.probes**0.5


@dataclass(frozen=True)
class FlowLikelihood:
    """The log density that the flow gives to states, float64 ``[B]`` nats, the states x_T at t = 1 to which the flow
    leads, float64 ``[B, C, H, W]``, and the evaluations of the network for each state."""

    log_prob: Tensor
    x_T: Tensor
    evaluations: int


class ProbabilityFlow:
    """The flow between the first state x_1 (time ``model.grid[1]``) and x_T, under the denoiser of the reverse process.

    A chain of one state has no path and is refused, and so is a model with a learned encoder or with a gamma for each
    pixel. A clipped denoiser gives a field with kinks, which takes more
    steps.

    Args:
        steps: steps of the solver, each of 4 evaluations of the network, at least 1.
    """

    def __init__(self, steps: int = 50) -> None:
        at_least(1, steps=steps)
        self.steps = steps

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for one passage."""
        return 4 * self.steps

    def encode(self, model: DiffusionModel, x1: Tensor, **cond: Any) -> Tensor:
        """x_T of states ``x1`` ``[B, C, H, W]``, float64. For an image x_0, give alpha_1 x_0."""
        z, _ = self._passage(model, x1, _still(_field(model, cond)), up=True)
        return z

    def decode(self, model: DiffusionModel, x_T: Tensor, **cond: Any) -> Tensor:
        """x_1 of states ``x_T`` ``[B, C, H, W]``, float64: the inverse of :meth:`encode`."""
        z, _ = self._passage(model, x_T, _still(_field(model, cond)), up=False)
        return z

    @torch.no_grad()
    def log_likelihood(
        self,
        model: DiffusionModel,
        x1: Tensor,
        *,
        divergence: Divergence | None = None,
        generators: Generators = None,
        **cond: Any,
    ) -> FlowLikelihood:
        """The density of the model's x_1 at given states, whose time is ``model.grid[1]``. No gradient passes.

        ``generators`` draw the vectors of a random ``divergence``; None is :class:`ExactDivergence`.
        """
        vectors = (ExactDivergence() if divergence is None else divergence).vectors(x1.double(), generators)
        x_T, integral = self._passage(model, x1, _moving(_field(model, cond), vectors), up=True)
        first, last = model.schedule.log_unit_var(model.grid[[1, -1]].to(x1.device))
        units = 0.5 * x1[0].numel() * (last - first)
        return FlowLikelihood(model.prior(x_T).log_prob(x_T) + units + integral, x_T, self.evaluations)

    def image_log_likelihood(
        self,
        model: DiffusionModel,
        x0: Tensor,
        *,
        divergence: Divergence | None = None,
        generators: Generators = None,
        **cond: Any,
    ) -> FlowLikelihood:
        """The density of x_1 / alpha_1 at ``x0``, the first state read as an image, else as :meth:`log_likelihood`.

        log p(x_0) = log p(x_1 = alpha_1 x_0) + D log alpha_1, as ``metrics.dequantized_log_prob`` asks for it.
        """
        log_alpha = model.schedule.log_alpha(model.grid[1].to(x0.device))
        x1 = torch.exp(log_alpha) * x0.double()
        of_state = self.log_likelihood(model, x1, divergence=divergence, generators=generators, **cond)
        return replace(of_state, log_prob=of_state.log_prob + x0[0].numel() * log_alpha)

    def _passage(self, model: DiffusionModel, x: Tensor, slope: _Slope, *, up: bool) -> tuple[Tensor, Tensor]:
        """The state at the other end, and the integral of the divergence over gamma, ``[B]``."""
        schedule = model.schedule
        if not model.has_plain_process:
            raise InputError(
                "the probability flow is that of a fixed encoder and one noise level for all pixels, and this model "
                "learns more: evaluate its bound, or draw samples"
            )
        # the ends of each step and the middle between them
        times = logsnr_grid(schedule, model.grid, 2 * self.steps + 1)[1:].to(x.device)
        times = times if up else times.flip(0)
        n_start, n_end = torch.exp(0.5 * schedule.log_unit_var(times[[0, -1]]))
        gamma_start, gamma_end = schedule.gamma(times[[0, -1]])
        h = (gamma_end - gamma_start) / self.steps
        z = x.double() / n_start
        integral = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for start, middle, end in zip(times[:-2:2], times[1:-1:2], times[2::2], strict=True):
            slope_1, divergence_1 = slope(z, start)
            slope_2, divergence_2 = slope(z + 0.5 * h * slope_1, middle)
            slope_3, divergence_3 = slope(z + 0.5 * h * slope_2, middle)
            slope_4, divergence_4 = slope(z + h * slope_3, end)
            z = z + h / 6 * (slope_1 + 2 * slope_2 + 2 * slope_3 + slope_4)
            integral = integral + h / 6 * (divergence_1 + 2 * divergence_2 + 2 * divergence_3 + divergence_4)
        return n_end * z, integral


def _field(model: DiffusionModel, cond: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """(z, t) -> dz / d gamma."""
    schedule, denoiser = model.schedule, model.reverse_process.denoiser

    def field(z: Tensor, t: Tensor) -> Tensor:
        t = as_times(t, z)
        log_n = 0.5 * schedule.log_unit_var(t)
        a, s = torch.exp(schedule.log_alpha(t) - log_n), torch.exp(0.5 * schedule.log_sigma2(t) - log_n)
        prediction = denoiser(expand_to(torch.exp(log_n), z) * z, t, **cond)
        return 0.5 * a * s * (a * prediction.eps - s * prediction.x0)

    return field


def _still(field: Callable[[Tensor, Tensor], Tensor]) -> _Slope:
    return lambda z, t: (field(z, t), z.new_zeros(len(z)))


def _moving(field: Callable[[Tensor, Tensor], Tensor], vectors: Tensor) -> _Slope:
    def slope(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = field(z, t)
        divergence = z.new_zeros(len(z))
        for vector in vectors:
            (product,) = torch.autograd.grad(value, z, vector.expand_as(value), retain_graph=True)
            divergence = divergence + sum_per_image(product * vector)
        return value.detach(), divergence

    return slope
