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
from ddpm_lightning.networks import ResidualStack
from ddpm_lightning.process.model import DiffusionModel

__all__ = ["ConvLevel", "DiffusionLevel", "Level", "LinearLevel", "VectorLevel"]


class Level(nn.Module):
    """Base of levels. A level is built when it is told the shape of the state below it."""

    def stand_on(self, below: Sequence[int]) -> tuple[int, ...]:
        """Build the level for states of shape ``below`` (without the batch) and return the shape of its own state.

        Raises:
            InputError: a shape that the level cannot stand on.
        """
        raise NotImplementedError

    def encode(self, below: Tensor) -> DiagonalGaussian:
        """:math:`q(x_n | x_{n-1})`, ``[B, *below]`` -> ``[B, *own]``."""
        raise NotImplementedError

    def decode(self, own: Tensor, **cond: Any) -> DiagonalGaussian:
        """:math:`p(x_{n-1} | x_n)`, ``[B, *own]`` -> ``[B, *below]``."""
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


class _NetworkLevel(Level):
    """An encoder and a decoder network, ``up`` and ``down``, which give a mean and a log variance for each value."""

    carry: float
    fixed_encoder: bool

    def _check(self, **sizes: int) -> None:
        at_least(1, "", **sizes)
        if not 0 <= self.carry < 1:
            raise InputError(f"carry = {self.carry:g} must lie in [0, 1)")

    def _set(self, below: Sequence[int], own: tuple[int, ...], up: nn.Module, down: nn.Module) -> tuple[int, ...]:
        self.below, self.own, self.down = tuple(below), own, down
        if self.fixed_encoder and self.below != own:
            raise InputError(
                f"fixed_encoder = true needs a state of the same shape as the one below, and they are {list(own)} and "
                f"{list(below)}"
            )
        self.up = None if self.fixed_encoder else up
        self.kept = self.carry if self.below == own else 0.0
        return own

    def _gaussian(self, start: Tensor, output: Tensor, shape: tuple[int, ...]) -> DiagonalGaussian:
        mean, log_var = (part.reshape(-1, *shape) for part in output.chunk(2, dim=1))
        mean = mean + self.kept * start if self.kept else mean
        # within (-12, 12), so that no variance overflows; nearly the network's own in the middle
        return DiagonalGaussian(mean, math.log1p(-(self.kept**2)) + 12 * torch.tanh(log_var / 12))

    def encode(self, below: Tensor) -> DiagonalGaussian:
        if self.up is None:
            log_var = below.new_full((1,) * below.ndim, math.log1p(-(self.kept**2)))
            return DiagonalGaussian(self.kept * below, log_var)
        return self._gaussian(below, self.up(below), self.own)

    def decode(self, own: Tensor, **cond: Any) -> DiagonalGaussian:
        return self._gaussian(own, self.down(own), self.below)


class ConvLevel(_NetworkLevel):
    r"""Convolutional encoder and decoder, for images on either side.

    At first their means are those of an autoregression,

    .. math:: q(x_n|x_{n-1}) = N(c x_{n-1}, (1 - c^2) I), \qquad p(x_{n-1}|x_n) = N(c x_n, (1 - c^2) I)

    with c = ``carry`` where the two shapes are equal, and 0 elsewhere.

    Args:
        channels: channels of the state.
        width: channels of the networks.
        blocks: residual blocks of each network.
        factor: the state's height and width are those below divided by it.
        carry: part of the state that is passed on at first, in [0, 1).
        fixed_encoder: keep q(x_n | x_{n-1}) as it is at first, as in a diffusion model. It needs equal shapes.
    """

    def __init__(
        self,
        channels: int,
        width: int = 32,
        blocks: int = 2,
        factor: int = 1,
        carry: float = 0.9,
        fixed_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.width, self.blocks, self.factor = channels, width, blocks, factor
        self.carry, self.fixed_encoder = carry, fixed_encoder
        self._check(channels=channels, width=width, factor=factor, blocks=blocks)

    def stand_on(self, below: Sequence[int]) -> tuple[int, ...]:
        if len(below) != 3 or below[1] % self.factor or below[2] % self.factor:
            raise InputError(
                f"the state below has the shape {list(below)}; it must be [channels, height, width] with a height and "
                f"width that factor = {self.factor} divides"
            )
        own = (self.channels, below[1] // self.factor, below[2] // self.factor)
        up = ResidualStack(below[0], 2 * self.channels, self.width, self.blocks, self.factor)
        down = ResidualStack(self.channels, 2 * below[0], self.width, self.blocks, self.factor, up=True)
        return self._set(below, own, up, down)


class VectorLevel(_NetworkLevel):
    """Encoder and decoder of two fully connected hidden layers, to a vector from a state of any shape.

    Args:
        size: length of the state.
        width: length of the hidden layers.
        carry: as in :class:`ConvLevel`.
        fixed_encoder: as in :class:`ConvLevel`.
    """

    def __init__(self, size: int, width: int = 256, carry: float = 0.9, fixed_encoder: bool = False) -> None:
        super().__init__()
        self.size, self.width, self.carry, self.fixed_encoder = size, width, carry, fixed_encoder
        self._check(size=size, width=width)

    def stand_on(self, below: Sequence[int]) -> tuple[int, ...]:
        inputs = math.prod(below)
        return self._set(below, (self.size,), self._network(inputs, self.size), self._network(self.size, inputs))

    def _network(self, inputs: int, outputs: int) -> nn.Sequential:
        last = nn.Linear(self.width, 2 * outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        hidden = (nn.Linear(inputs, self.width), nn.SiLU(), nn.Linear(self.width, self.width), nn.SiLU())
        return nn.Sequential(nn.Flatten(), *hidden, last)


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
        if not model.encoder.is_identity:
            raise InputError(
                f"{type(model.encoder).__name__} makes q(x_n | x_{{n-1}}) depend on x_0, which a level does not know: "
                "give a diffusion model with a fixed encoder"
            )
        self.model, self.n = model, n

    def stand_on(self, below: Sequence[int]) -> tuple[int, ...]:
        return tuple(below)

    def encode(self, below: Tensor) -> DiagonalGaussian:
        return self.model.encoder_step(self.n, below, below)

    def decode(self, own: Tensor, **cond: Any) -> DiagonalGaussian:
        if self.n == 1:
            return self.model.reconstruction_gaussian(own, **cond)
        return self.model.reverse(self.n - 1, own, **cond)
