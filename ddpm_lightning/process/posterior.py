r"""Denoisers of p(x_t | y) for a linear measurement :math:`y = A x_0 + \text{noise}`: guidance by the likelihood.

:math:`p(y | x_t) = E[p(y | x_0) | x_t]` has no closed form. With :math:`p(x_0 | x_t)` taken as
:math:`N(\hat x_0, V_t)`,

.. math:: p(y | x_t) = N(y; \; A \hat x_0, \; \sigma_y^2 I + A V_t A^T), \qquad \sigma_y^2 = \mathrm{noise\_var}

DPS takes :math:`V_t = 0`. MMPS takes the true covariance, by Tweedie's formula
:math:`V_t = (\sigma_t^2 / \alpha_t) \, \partial \hat x_0 / \partial x_t`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import at_least
from ddpm_lightning.ops import expand_to, sum_per_image
from ddpm_lightning.process.denoiser import Denoiser
from ddpm_lightning.process.guidance import ProductDenoiser, differentiable, fresh
from ddpm_lightning.process.measurement import LinearMeasurement
from ddpm_lightning.process.parameterization import Prediction

__all__ = ["DPSDenoiser", "MMPSDenoiser", "conjugate_gradients"]


class DPSDenoiser(ProductDenoiser):
    r"""Diffusion posterior sampling (Chung et al. 2023, arXiv 2209.14687):

    .. math:: p(y | x_t) = p(y | x_0 = \hat x_0(x_t))

    One evaluation of the network and its gradient. DPS treats x0_hat as if it were the image, so its gradient is too
    large at high noise, mostly where noise_var is small against the covariance of x_0 given x_t. Then the samples vary
    too little, and a coarse grid diverges. The paper's algorithm has a step size over the norm of the residual in the
    place of 1 / (2 noise_var), which is not a likelihood. Here ``scale`` can be adjusted.

    Args:
        denoiser: of p(x_t).
        measurement: y, A and the variance of the noise.
        scale: factor of log p(y | x_t).
    """

    def __init__(self, denoiser: Denoiser, measurement: LinearMeasurement, scale: float = 1.0) -> None:
        self.measurement, self.scale = measurement, scale
        super().__init__(denoiser, self._log_likelihood)

    def _log_likelihood(self, x_t: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        return self.scale * self.measurement.log_prob(x0_hat)


class MMPSDenoiser(Denoiser):
    r"""Moment-matching posterior sampling (Rozet et al. 2024, arXiv 2405.13712, section 4):

    .. math::

        \nabla \log p(y | x_t) = J^T A^T (\sigma_y^2 I + A V_t A^T)^{-1} (y - A \hat x_0),
            \qquad J = \partial \hat x_0 / \partial x_t

    with :math:`V_t = (\sigma_t^2 / \alpha_t) J^T`. Products of V_t with vectors are vector-Jacobian products of the
    denoiser. Conjugate gradients solve the system, image by image. For Gaussian data, where V_t does not depend on x_t,
    the result is exact after as many iterations as the matrix has different eigenvalues.

    One evaluation of the network and ``iterations`` + 1 gradients.

    Args:
        denoiser: of p(x_t).
        measurement: y, A and the variance of the noise.
        iterations: of conjugate gradients, at least 1.
    """

    def __init__(self, denoiser: Denoiser, measurement: LinearMeasurement, iterations: int = 5) -> None:
        at_least(1, "steps of conjugate gradients", iterations=iterations)
        self.denoiser, self.schedule = denoiser, denoiser.schedule
        self.measurement, self.iterations = measurement, iterations

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        operator, noise_var = self.measurement.operator, self.measurement.noise_var
        with differentiable(x_t) as (x, nested):
            t, cond = fresh(t), {name: fresh(value) for name, value in cond.items()}
            alpha_t, sigma_t = self.scales(x, t)
            tweedie = sigma_t.square() / alpha_t
            prediction = self.denoiser(x, t, **cond)
            x0 = prediction.x0
            if not nested:
                tweedie = tweedie.detach()

            def vjp(v: Tensor) -> Tensor:
                (product,) = torch.autograd.grad(x0, x, v, retain_graph=True, create_graph=nested)
                return product

            def covariance(v: Tensor) -> Tensor:
                return noise_var * v + operator.apply(tweedie * vjp(operator.adjoint(v)))

            residual = self.measurement.residual(x0 if nested else x0.detach())
            gradient = vjp(operator.adjoint(conjugate_gradients(covariance, residual, self.iterations)))
        prediction = prediction if nested else prediction.detached()
        return prediction.with_score_added(gradient, *self.scales(x_t, t))


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """An approximate solution of M z = b for each image, from z = 0 (Hestenes & Stiefel 1952).

    ``matrix`` maps v ``[B, ...]`` to M v, symmetric and positive definite for each image. An image that is solved takes
    no more steps, and no step goes along a direction in which M is not positive, as it can be for a network.
    """
    z, r, p = torch.zeros_like(b), b, b
    square = sum_per_image(r.square())
    for _ in range(iterations):
        product = matrix(p)
        step = expand_to(_ratio(square, sum_per_image(p * product)), b).to(b.dtype)
        z, r = z + step * p, r - step * product
        square, before = sum_per_image(r.square()), square
        p = r + expand_to(_ratio(square, before), b).to(b.dtype) * p
    return z


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)
