r"""The probability-flow ODE (Song et al. 2021, arXiv 2011.13456, section 4.3): an invertible map between states, and
the density that it gives them.

Take units in which :math:`\alpha^2 + \sigma^2 = 1`: :math:`z = x / n` with :math:`n^2 = \alpha^2 + \sigma^2`,
:math:`a = \alpha / n` and :math:`s = \sigma / n`. For any schedule the ODE in :math:`\gamma = -\log \mathrm{SNR}`, and
the change of the density along it, are

.. math::

    \frac{dz}{d\gamma} = \tfrac12 a s v, \quad v = a \hat\epsilon - s \hat x_0,
        \qquad \frac{d \log p(z)}{d\gamma} = -\nabla_z \cdot \frac{dz}{d\gamma}

so with the prior at t = 1 and the first state x_1

.. math::

    \log p(x_1) = \log p(x_T) + D \log \frac{n_T}{n_1} +
        \int_{\gamma_1}^{\gamma_T} \nabla_z \cdot (\tfrac12 a s v) \, d\gamma

The rule of integration is Runge-Kutta's of order 4 on equal steps in gamma, in float64. How many steps are enough
depends on the network and on the image: see :meth:`ProbabilityFlow.log_likelihood`, which finds out. A network told the
time can be rough in gamma between the states that it was trained on, and a clipped denoiser has kinks: there scipy's
RK45 needed no fewer evaluations for the same error (docs/sampling.md). Besides, its steps are those of one image at a
time, which is slow, or those of a batch, as torchdiffeq's are, and then an image's density depends on the others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least, positive
from ddpm_lightning.ops import Generators, as_times, expand_to, randn_like, sum_per_image
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.schedules import logsnr_grid

__all__ = ["Divergence", "ExactDivergence", "FlowLikelihood", "HutchinsonDivergence", "ProbabilityFlow"]

_STAGES = 4  # evaluations of the network in a step
_Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(z, t) -> dz/d gamma ``[B, C, *space]`` and its divergence ``[B]``."""


class Divergence:
    r"""The trace of the field's Jacobian, as :math:`\sum_k e_k \cdot J e_k` with the vectors e_k of a subclass."""

    def vectors(self, z: Tensor, generators: Generators = None) -> Tensor:
        r"""e_k, ``[K, B or 1, C, *space]``, with :math:`\sum_k e_k e_k^T = I` in expectation; the same all along the
        path."""
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
    """What the flow says of each state, with what it cost.

    Attributes:
        log_prob: the log density, float64 ``[B]`` nats.
        x_T: the states at t = 1 to which the flow leads, float64 ``[B, C, *space]``.
        error: estimate of the numerical error of ``log_prob``, float64 ``[B]`` nats, not negative. It says nothing of
            what random vectors do (:class:`HutchinsonDivergence`).
        steps: steps of the solver behind the value, int64 ``[B]``.
        evaluations: evaluations of the network for it and for its error, int64 ``[B]``.
    """

    log_prob: Tensor
    x_T: Tensor
    error: Tensor
    steps: Tensor
    evaluations: Tensor


class ProbabilityFlow:
    """The flow between the first state x_1 (time ``model.grid[1]``) and x_T, under the denoiser of the reverse process.

    A chain of one state has no path and is refused, and so is a model with a learned encoder or with a gamma for each
    pixel.

    Args:
        steps: steps of the solver from end to end, each of 4 evaluations of the network, at least 1. A density begins
            with as many.
        tolerance: the numerical error of each image's log density, in nats, that is small enough; positive.
        max_steps: steps of a density are doubled up to here, at least 4 ``steps`` + 3: an error needs two doublings.
    """

    def __init__(self, steps: int = 50, tolerance: float = 0.1, max_steps: int = 4000) -> None:
        at_least(1, steps=steps)
        positive("nats", tolerance=tolerance)
        at_least(_finer(_finer(steps)), f"{steps} steps are doubled twice for an error", max_steps=max_steps)
        self.steps, self.tolerance, self.max_steps = steps, tolerance, max_steps

    def encode(self, model: DiffusionModel, x1: Tensor, **cond: Any) -> Tensor:
        r"""x_T of states ``x1`` ``[B, C, *space]``, float64, by ``steps`` steps. For an image x_0, give
        :math:`\alpha_1 x_0`."""
        z, _ = _passage(model, x1, _still(_field(model, cond)), self.steps, up=True)
        return z

    def decode(self, model: DiffusionModel, x_T: Tensor, **cond: Any) -> Tensor:
        """x_1 of states ``x_T`` ``[B, C, *space]``, float64, by ``steps`` steps: the inverse of :meth:`encode`."""
        z, _ = _passage(model, x_T, _still(_field(model, cond)), self.steps, up=False)
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

        The steps of an image are doubled until its ``error`` is ``tolerance`` or less, or until ``max_steps``: then the
        error stays above the tolerance. The error is the change by the last doubling, or half the change by the one
        before, if that is larger. It is an estimate, no bound. Halves, because the error falls as 1/steps where a
        network is rough between the times that it was trained on, or a clipped denoiser has kinks; and two changes,
        because a single small one may be luck. An image that is done leaves the batch, and has no part in the steps of
        another. So a denoiser that holds a measurement of each image must be given one image at a time.

        ``generators`` draw the vectors of a random ``divergence``, the same ones for any number of steps; None is
        :class:`ExactDivergence`. ``cond`` are tensors ``[B, ...]``.
        """
        vectors = (ExactDivergence() if divergence is None else divergence).vectors(x1.double(), generators)
        rows, steps = torch.arange(len(x1), device=x1.device), self.steps
        log_prob, x_T = self._density(model, x1, vectors, cond, steps)
        change = torch.full_like(log_prob, torch.inf)
        error, taken = change.clone(), torch.full_like(rows, steps)
        evaluations = _STAGES * taken
        while len(rows) and _finer(steps) <= self.max_steps:
            steps = _finer(steps)
            own = vectors if vectors.shape[1] == 1 else vectors[:, rows]
            found, ends = self._density(model, x1[rows], own, {name: c[rows] for name, c in cond.items()}, steps)
            latest = (found - log_prob[rows]).abs()
            error[rows] = torch.maximum(0.5 * change[rows], latest)
            log_prob[rows], x_T[rows], change[rows], taken[rows] = found, ends, latest, steps
            evaluations[rows] += _STAGES * steps
            # NaN is not done
            rows = rows[~(error[rows] <= self.tolerance)]
        return FlowLikelihood(log_prob, x_T, error, taken, evaluations)

    def image_log_likelihood(
        self,
        model: DiffusionModel,
        x0: Tensor,
        *,
        divergence: Divergence | None = None,
        generators: Generators = None,
        **cond: Any,
    ) -> FlowLikelihood:
        r"""The density of :math:`x_1 / \alpha_1` at ``x0``, the first state read as an image, else as
        :meth:`log_likelihood`.

        .. math:: \log p(x_0) = \log p(x_1 = \alpha_1 x_0) + D \log \alpha_1

        as ``metrics.dequantized_log_prob`` asks for it.
        """
        log_alpha = model.schedule.log_alpha(model.grid[1].to(x0.device))
        x1 = torch.exp(log_alpha) * x0.double()
        of_state = self.log_likelihood(model, x1, divergence=divergence, generators=generators, **cond)
        return replace(of_state, log_prob=of_state.log_prob + x0[0].numel() * log_alpha)

    @staticmethod
    def _density(
        model: DiffusionModel, x1: Tensor, vectors: Tensor, cond: dict[str, Any], steps: int
    ) -> tuple[Tensor, Tensor]:
        """The log density ``[B]`` and x_T."""
        x_T, integral = _passage(model, x1, _moving(_field(model, cond), vectors), steps, up=True)
        first, last = model.schedule.log_unit_var(model.grid[[1, -1]].to(x1.device))
        units = 0.5 * x1[0].numel() * (last - first)
        return model.prior(x_T).log_prob(x_T) + units + integral, x_T


def _finer(steps: int) -> int:
    # one more than twice as many: grids that share their nodes would agree on what has a period that fits the nodes
    return 2 * steps + 1


def _passage(model: DiffusionModel, x: Tensor, slope: _Slope, steps: int, *, up: bool) -> tuple[Tensor, Tensor]:
    """The state at the other end, and the integral of the divergence over gamma, ``[B]``."""
    schedule = model.schedule
    if not model.has_plain_process:
        raise InputError(
            "the probability flow is that of a fixed encoder and one noise level for all pixels, and this model "
            "learns more: evaluate its bound, or draw samples"
        )
    # the ends of each step and the middle between them
    times = logsnr_grid(schedule, model.grid, 2 * steps + 1)[1:].to(x.device)
    times = times if up else times.flip(0)
    n_start, n_end = torch.exp(0.5 * schedule.log_unit_var(times[[0, -1]]))
    gamma_start, gamma_end = schedule.gamma(times[[0, -1]])
    h = (gamma_end - gamma_start) / steps
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
    r""":math:`(z, t) \to dz / d\gamma`."""
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
