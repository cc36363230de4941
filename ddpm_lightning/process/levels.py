r"""The levels of a hierarchical VAE: each holds the encoder from the state below to its own, and the decoder back.

.. math:: q(x_n | x_{n-1}) \text{ and } p(x_{n-1} | x_n), \quad \text{diagonal Gaussians}
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lightning.distributions import DiagonalGaussian
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.process.model import DiffusionModel

__all__ = ["DiffusionLevel", "Level", "LinearLevel"]


class Level(nn.Module):
    """Base of levels. A level is built when it is told the shape of the state below it."""

    def stand_on(self, below: Sequence[int]) -> tuple[int, ...]:
        """Build the level for states of shape ``below`` (without the batch) and return the shape of its own state.

        Raises:
            InputError: a shape that the level cannot stand on.
        """
        raise NotImplementedError

    def encode(self, below: Tensor) -> DiagonalGaussian:
        """q(x_n | x_{n-1}), ``[B, *below]`` -> ``[B, *own]``."""
        raise NotImplementedError

    def decode(self, own: Tensor, **cond: Any) -> DiagonalGaussian:
        """p(x_{n-1} | x_n), ``[B, *own]`` -> ``[B, *below]``."""
        raise NotImplementedError


class LinearLevel(Level):
    r"""Linear means and constant variances: with plain Gaussian data the whole hierarchy is one joint Gaussian.

    .. math:: x_n = A x_{n-1} + b + \sqrt{v} \, \epsilon, \qquad x_{n-1} = A' x_n + b' + \sqrt{v'} \, \epsilon

    Args:
        size: length of the state, a vector. The state below may have any shape.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        at_least(1, size=size)
        self.size = size

    def stand_on(self, below: Sequence[int]) -> tuple[int, ...]:
        self.below = tuple(below)
        inputs = math.prod(below)
        self.up, self.down = nn.Linear(inputs, self.size), nn.Linear(self.size, inputs)
        self.log_var_up = nn.Parameter(torch.zeros(self.size))
        self.log_var_down = nn.Parameter(torch.zeros(inputs))
        return (self.size,)

    def encode(self, below: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(self.up(below.flatten(1)), self.log_var_up[None])

    def decode(self, own: Tensor, **cond: Any) -> DiagonalGaussian:
        mean, log_var = self.down(own), self.log_var_down[None]
        return DiagonalGaussian(mean.unflatten(1, self.below), log_var.unflatten(1, self.below))


class DiffusionLevel(Level):
    """Level n of a diffusion model: its fixed forward step, and its reverse step or, for n = 1, its decoder's Gaussian.

    Levels 1..T of a model, which share its network, make the hierarchy that the diffusion model is.

    Args:
        model: the diffusion model.
        n: the number of the level, 1..T.
    """

    def __init__(self, model: DiffusionModel, n: int) -> None:
        super().__init__()
        if not 1 <= n <= model.T:
            raise InputError(f"n = {n} must lie in 1..{model.T}, the states of the diffusion model")
        self.model, self.n = model, n

    def stand_on(self, below: Sequence[int]) -> tuple[int, ...]:
        return tuple(below)

    def encode(self, below: Tensor) -> DiagonalGaussian:
        return self.model.encoder(self.n, below)

    def decode(self, own: Tensor, **cond: Any) -> DiagonalGaussian:
        if self.n == 1:
            return self.model.reconstruction_gaussian(own, **cond)
        return self.model.reverse(self.n - 1, own, **cond)
