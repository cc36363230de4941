r"""Weights on the squared error of eps, as functions of the noise level.

A weight w(t) on :math:`|\epsilon - \epsilon_\theta|^2` at times uniform in t is the same loss as

.. math::

    \tfrac12 \int w_\text{rel}(\gamma) \, |\epsilon - \epsilon_\theta|^2 \, d\gamma,
        \qquad w_\text{rel} = 2 w(t) / \gamma'(t)

which does not depend on how the schedule moves through the noise levels. w_rel is the weight relative to the
variational bound. Where w_rel increases with the noise, the loss is still a bound, on noisy data (Kingma & Gao 2023,
arXiv 2303.00848, theorem 1). :class:`ElboWeighting` and :class:`EDMWeighting` are given by their w_rel:
:math:`\gamma'(t)` appears in them and the schedule cancels. The others are given by w and depend on the schedule.
"""

import math

import torch
from torch import Tensor

from ddpm_lightning.errors import positive
from ddpm_lightning.objectives.times import logit_normal_density
from ddpm_lightning.schedules import Schedule

__all__ = [
    "EDMWeighting",
    "ElboWeighting",
    "LogitNormalWeighting",
    "MinSNRWeighting",
    "P2Weighting",
    "UniformWeighting",
    "VelocityWeighting",
    "Weighting",
]


class Weighting:
    """The weight w(t) of the squared error of eps, shape of ``t``, float64. At all ``t`` gamma is finite."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        raise NotImplementedError


class UniformWeighting(Weighting):
    """1: the "simple" loss (Ho et al. 2020, equation 14)."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)


class MinSNRWeighting(Weighting):
    r"""The SNR, cut off at ``clip``, as the weight on the error of x_0 (Hang et al. 2023, arXiv 2303.09556):

    .. math:: w(t) = \min(\mathrm{SNR}, \text{clip}) / \mathrm{SNR}

    1 where the SNR is below ``clip``; less in nearly clean images.

    Args:
        clip: the largest weight on the error of x_0, positive.
    """

    def __init__(self, clip: float = 5.0) -> None:
        positive(clip=clip)
        self.clip = clip

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return torch.exp((schedule.gamma(t) + math.log(self.clip)).clamp(max=0))


class P2Weighting(Weighting):
    r""":math:`1 / (k + \mathrm{SNR})^\text{power}` (Choi et al. 2022, arXiv 2204.00227).

    Args:
        k: keeps the weight of pure noise finite; positive.
        power: the larger, the less clean images weigh; 0 is the simple loss.
    """

    def __init__(self, k: float = 1.0, power: float = 1.0) -> None:
        positive(k=k)
        self.k, self.power = k, power

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return (self.k + torch.exp(-schedule.gamma(t))) ** -self.power


class EDMWeighting(Weighting):
    r"""The loss of Karras et al. 2022 (arXiv 2206.00364, table 1), whatever the schedule. It is

    .. math::

        E_{\log \sigma \sim N(\text{mean}, \text{std}^2)} \left[ \frac{\sigma^2
            + \sigma_\text{data}^2}{(\sigma \sigma_\text{data})^2} |x_0 - \hat x_0|^2 \right]

    with :math:`\sigma = \sigma_t / \alpha_t = e^{\gamma/2}`, the noise beside an unscaled image. The error of x_0 is
    sigma times the error of eps, and :math:`\gamma = 2 \log \sigma \sim N(2 \, \text{mean}, (2 \, \text{std})^2)` has
    the density p. So at times uniform in t

    .. math:: w(t) = p(\gamma) \, \gamma'(t) \, (1 + \sigma^2 / \sigma_\text{data}^2)

    It is exact in continuous time, but for the noise levels that the schedule does not reach.

    Args:
        sigma_data: standard deviation of the data, positive.
        mean: mean of log sigma.
        std: standard deviation of log sigma, positive.
    """

    def __init__(self, sigma_data: float = 0.5, mean: float = -1.2, std: float = 1.2) -> None:
        positive(sigma_data=sigma_data, std=std)
        self.sigma_data, self.mean, self.std = sigma_data, mean, std

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        gamma = schedule.gamma(t)
        z = (gamma / 2 - self.mean) / self.std
        density = torch.exp(-0.5 * z.square()) / (2 * self.std * math.sqrt(2 * math.pi))
        return density * schedule.gamma_slope(t) * (1 + torch.exp(gamma) / self.sigma_data**2)


class VelocityWeighting(Weighting):
    r"""The loss of flow matching, the squared error of the velocity :math:`u = \epsilon - x_0`, as a weight on the
    error of eps:

    .. math:: w(t) = \frac{(\alpha_t + \sigma_t)^2}{\alpha_t^2} = (1 + e^{\gamma/2})^2
    """

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return (1 + torch.exp(0.5 * schedule.gamma(t))).square()


class LogitNormalWeighting(Weighting):
    r"""A density over times as a weight, times that of another weighting (Esser et al. 2024, arXiv 2403.03206):

    .. math:: \mathrm{logit}(t) \sim N(\text{mean}, \text{std}^2)

    With ``LogitNormalTimes`` of the same mean and std and ``continuous: true`` the weight of a draw cancels this one.
    The loss is then the usual one of flow matching: times from the density, and no weight on them.

    Args:
        mean: mean of logit(t): above 0 for more noise.
        std: standard deviation of logit(t), positive.
        of: the weighting that is multiplied; None for VelocityWeighting.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, of: Weighting | None = None) -> None:
        positive(std=std)
        self.mean, self.std, self.of = mean, std, of

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return logit_normal_density(t.double(), self.mean, self.std) * (self.of or VelocityWeighting())(schedule, t)


class ElboWeighting(Weighting):
    r""":math:`\gamma'(t) / 2`: the diffusion term of the continuous bound (Kingma et al. 2021, equation 18), nats a
    dimension.

    In continuous time ``WeightedMSE`` has exactly this expectation. On a grid it is a Riemann sum.
    """

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return schedule.gamma_slope(t) / 2
