r"""What the network's output means. Every parameterisation converts to one canonical form: x_0 and eps.

From :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` either of the two follows from the other, so n parameterisations
need n conversions, and everything behind the denoiser is written once.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = [
    "CategoricalParameterization",
    "EpsParameterization",
    "Parameterization",
    "Prediction",
    "ScoreParameterization",
    "VParameterization",
    "VelocityParameterization",
    "X0Parameterization",
]


@dataclass(frozen=True)
class Prediction:
    r"""A denoiser's answer at (x_t, t), in the canonical form: ``[B, C, *space]`` both.

    .. math:: x_t = \alpha_t x_0 + \sigma_t \epsilon"""

    x0: Tensor
    eps: Tensor
    output: Tensor  # what the network itself returned for the image
    variance_output: Tensor | None = None  # what it returned for the reverse variance

    def clipped(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> "Prediction":
        """The same with x0 clipped to [-1, 1] and eps recomputed from it, so that the two stay consistent."""
        x0 = self.x0.clamp(-1, 1)
        return Prediction(x0, (x_t - alpha_t * x0) / sigma_t, self.output, self.variance_output)

    def with_score_added(self, gradient: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> "Prediction":
        r"""The same with ``gradient`` ``[B, C, *space]`` added to the score :math:`-\epsilon / \sigma_t`, and x0 to
        match."""
        x0 = self.x0 + sigma_t.square() / alpha_t * gradient
        return replace(self, x0=x0, eps=self.eps - sigma_t * gradient)

    def detached(self) -> "Prediction":
        variance_output = None if self.variance_output is None else self.variance_output.detach()
        return Prediction(self.x0.detach(), self.eps.detach(), self.output.detach(), variance_output)


class Parameterization:
    """Meaning of the network's output. ``alpha_t``, ``sigma_t`` are ``[B, 1, ...]``, images ``[B, C, *space]``."""

    @classmethod
    def output_channels(cls, channels: int, levels: int | None) -> int:
        """Channels of the output for images of that many channels and grey levels (None for fields)."""
        return channels

    def predict(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Prediction:
        """Canonical form of the network's ``output``."""
        raise NotImplementedError

    def target(self, x0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """What the output would be for a perfect guess of this ``x0`` and ``eps``."""
        raise NotImplementedError


class EpsParameterization(Parameterization):
    """The output is eps, the standardised noise (Ho et al. 2020, equation 11)."""

    def predict(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Prediction:
        # alpha_t can be as small as 1e-5 at the end of a cosine chain: divide in the images' own dtype, never in half
        return Prediction(x0=(x_t - sigma_t * output) / alpha_t, eps=output, output=output)

    def target(self, x0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return eps


class X0Parameterization(Parameterization):
    """The output is x0 itself."""

    def predict(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Prediction:
        return Prediction(x0=output, eps=(x_t - alpha_t * output) / sigma_t, output=output)

    def target(self, x0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return x0


class VParameterization(Parameterization):
    r"""The output is :math:`v = \alpha_t \epsilon - \sigma_t x_0` (Salimans & Ho 2022, arXiv 2202.00512, appendix D).

    Well conditioned at both ends: for a variance-preserving schedule :math:`x_0 = \alpha_t x_t - \sigma_t v`. Under
    another schedule v is divided by :math:`n = \sqrt{\alpha_t^2 + \sigma_t^2}`, which makes it the same number in any
    units of x_t.
    """

    def predict(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Prediction:
        n = torch.hypot(alpha_t, sigma_t)
        x0 = (alpha_t / n * x_t - sigma_t * output) / n
        return Prediction(x0=x0, eps=(sigma_t / n * x_t + alpha_t * output) / n, output=output)

    def target(self, x0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return (alpha_t * eps - sigma_t * x0) / torch.hypot(alpha_t, sigma_t)


class VelocityParameterization(Parameterization):
    r"""The output is the velocity :math:`u = \epsilon - x_0` (flow matching; Lipman et al. 2022, arXiv 2210.02747).

    On :class:`~ddpm_lightning.schedules.StraightPath` u is :math:`dx_t/d\tau`, the velocity of the probability-flow
    ODE. An Euler step of the ODE is then a step of DDIM. Under any schedule

    .. math:: x_0 = \frac{x_t - \sigma_t u}{\alpha_t + \sigma_t}, \qquad
        \epsilon = \frac{x_t + \alpha_t u}{\alpha_t + \sigma_t}
    """

    def predict(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Prediction:
        n = alpha_t + sigma_t
        return Prediction(x0=(x_t - sigma_t * output) / n, eps=(x_t + alpha_t * output) / n, output=output)

    def target(self, x0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return eps - x0


class ScoreParameterization(Parameterization):
    r"""The output is the score :math:`-\epsilon / \sigma_t = \nabla \log q(x_t)` (Song et al. 2021, arXiv
    2011.13456)."""

    def predict(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Prediction:
        return Prediction(x0=(x_t + sigma_t.square() * output) / alpha_t, eps=-sigma_t * output, output=output)

    def target(self, x0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        return -eps / sigma_t


class CategoricalParameterization(Parameterization):
    r"""The output is a distribution over the grey levels of each pixel, as it is before x_t is seen in that pixel:
    logits :math:`\ell_k`, ``[B, C levels, *space]``, the levels of one channel after another. What x_t says of the
    pixel is added exactly, by Bayes' rule:

    .. math::

        p(x_0 = v_k | x_t) \propto e^{\ell_k} \, N(x_t; \alpha_t v_k, \sigma_t^2), \qquad
        \hat x_0 = \sum_k v_k \, p(x_0 = v_k | x_t)

    Equal logits are the best guess for pixels that are independent and have equally likely levels. So a network need
    not learn how to remove noise that is smaller than the distance of the levels. The idea of predicting
    :math:`p(x_0 | x_t)` level by level is that of Austin et al. 2021 (arXiv 2107.03006, section 3.3).
    :class:`~ddpm_lightning.networks.LevelsUNet` gives such logits. Needs ``levels`` times the memory of the images.
    """

    @classmethod
    def output_channels(cls, channels: int, levels: int | None) -> int:
        if levels is None:
            raise InputError(f"{cls.__name__} is for grey levels, and fields have none: use VParameterization")
        return channels * levels

    def predict(self, output: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Prediction:
        levels = output.shape[1] // x_t.shape[1]
        v = torch.linspace(-1, 1, levels, dtype=x_t.dtype, device=x_t.device)
        # the levels last, where LevelsUNet has them in memory: this takes half the time so
        logits = output.unflatten(1, (-1, levels)).movedim(2, -1)
        noise = (x_t / sigma_t)[..., None] - (alpha_t / sigma_t)[..., None] * v
        posterior = torch.addcmul(logits, noise, noise, value=-0.5).softmax(-1)
        x0 = (posterior * v).sum(-1)
        return Prediction(x0=x0, eps=(x_t - alpha_t * x0) / sigma_t, output=output)

    def target(self, x0: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        raise InputError("CategoricalParameterization has no error of its own: give the objective another target")
