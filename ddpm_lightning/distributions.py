r"""The one distribution that the whole chain is made of.

For a diagonal Gaussian of mean :math:`\mu` and log variance :math:`\ell` over D dimensions (values of an image), in
nats:

.. math::

    \log p(x) &= -\tfrac12 \sum_d \left[ (x - \mu)^2 e^{-\ell} + \ell + \log 2\pi \right] \\
    \mathrm{KL}(p \| q) &= \tfrac12 \sum_d \left[ e^{\ell_p - \ell_q} - 1 - (\ell_p - \ell_q)
        + (\mu_p - \mu_q)^2 e^{-\ell_q} \right]
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lightning.ops import Generators, expand_to, randn_like, sum_per_image, sum_per_image_of

__all__ = ["DiagonalGaussian", "centred_like"]

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class DiagonalGaussian:
    """Diagonal Gaussian over images.

    Attributes:
        mean: ``[B, C, *space]``.
        log_var: natural logarithm of the variance, broadcastable to ``mean`` (``[B, 1, ...]`` or ``[1, 1, ...]``
            where one variance serves a whole image). Kept in float64 by the processes: differences of it are what
            the bound is made of.
    """

    mean: Tensor
    log_var: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation, shape of ``log_var``, dtype of ``mean``."""
        return torch.exp(0.5 * self.log_var).to(self.mean.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of ``x`` ``[B, C, *space]``: ``[B]`` nats, float64."""
        square = (x - self.mean).square() * torch.exp(-self.log_var).to(x.dtype)
        return -0.5 * (sum_per_image(square) + sum_per_image_of(self.log_var + _LOG_2PI, x))

    def kl(self, other: "DiagonalGaussian") -> Tensor:
        """KL(self || other): ``[B]`` nats, float64."""
        difference = self.log_var - other.log_var
        square = (self.mean - other.mean).square() * torch.exp(-other.log_var).to(self.mean.dtype)
        # expm1(d) - d keeps the second order when the variances are nearly equal
        return 0.5 * (sum_per_image(square) + sum_per_image_of(torch.expm1(difference) - difference, self.mean))

    def entropy(self) -> Tensor:
        """Differential entropy: ``[B]`` nats, float64."""
        return 0.5 * sum_per_image_of(self.log_var + (1 + _LOG_2PI), self.mean)

    def sample(self, generators: Generators = None) -> Tensor:
        """One draw for each image: ``[B, C, *space]``, dtype of ``mean``."""
        return self.mean + self.std * randn_like(self.mean, generators)


def centred_like(x: Tensor, log_var: Tensor) -> DiagonalGaussian:
    """N(0, exp(log_var) I) over tensors of the shape of ``x``; ``log_var`` is ``[]``, or ``[1, C, *space]``."""
    return DiagonalGaussian(torch.zeros_like(x), expand_to(log_var.to(x.device), x))
