"""A generative model as a chain of latent variables: all that the bound needs to know of it."""

from typing import Any

from torch import Tensor, nn

from ddpm_lightning.distributions import DiagonalGaussian
from ddpm_lightning.process.decoders import Decoder

__all__ = ["GenerativeModel"]


class GenerativeModel(nn.Module):
    r"""A Markov chain of latent variables over data x_0, and an encoder that is a Markov chain too, given x_0.

    .. math::

        p(x_0, \dots, x_T) &= p(x_T) \, p(x_0|x_1) \prod_{n=1}^{T-1} p(x_n|x_{n+1}) \\
        q(x_1, \dots, x_T|x_0) &= \prod_{n=1}^{T} q(x_n|x_{n-1}, x_0)

    The states x_n may differ in shape, ``[B, ...]``. ``n`` is a whole number, or int64 ``[B]`` where all the states
    that may be meant have one shape.
    """

    network: nn.Module
    """What is trained of it, but for a learned schedule."""
    decoder: Decoder

    @property
    def T(self) -> int:
        """Number of latent states."""
        raise NotImplementedError

    def with_steps(self, T: int) -> "GenerativeModel":
        """The same model, sharing its weights, with T latent states."""
        raise NotImplementedError

    def encoder_step(self, n: int | Tensor, before: Tensor, x0: Tensor) -> DiagonalGaussian:
        """:math:`q(x_n | x_{n-1}, x_0)`, n in 1..T. Where the encoder is a Markov chain by itself, ``x0`` has no part
        in it."""
        raise NotImplementedError

    def encoder_marginal(self, n: int | Tensor, x0: Tensor) -> DiagonalGaussian:
        """:math:`q(x_n | x_0)`, n in 1..T, where it is known: for n = 1 always."""
        raise NotImplementedError

    def reverse(self, n: int | Tensor, after: Tensor, **cond: Any) -> DiagonalGaussian:
        """:math:`p(x_n | x_{n+1})`, n in 1..T-1."""
        raise NotImplementedError

    def reconstruction_gaussian(self, x1: Tensor, **cond: Any) -> DiagonalGaussian:
        """The Gaussian over x_0 from which the decoder makes :math:`p(x_0 | x_1)`."""
        raise NotImplementedError

    def prior(self, like: Tensor) -> DiagonalGaussian:
        """p(x_T) over tensors of the shape of ``like``."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What a report says of the model, as plain data."""
        return {}

    def log_likelihood(self, x0: Tensor, x1: Tensor, **cond: Any) -> Tensor:
        r""":math:`\log p(x_0 | x_1)`, ``[B]`` nats."""
        return self.decoder.log_prob(x0, self.reconstruction_gaussian(x1, **cond))
