"""Markovian hierarchical VAEs: a chain of latent variables with learned encoders.

A diffusion model is the case of three restrictions: latent variables of the data's shape, fixed linear-Gaussian
encoders, and one network for all decoders (Luo 2022, arXiv 2208.11970, section "Variational Diffusion Models").
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddpm_lightning.distributions import DiagonalGaussian, centred_like
from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators, randn_like
from ddpm_lightning.process.decoders import Decoder
from ddpm_lightning.process.generative import GenerativeModel
from ddpm_lightning.process.levels import Level

__all__ = ["HierarchicalVAE"]


class HierarchicalVAE(GenerativeModel):
    r"""A hierarchy of T >= 1 levels; with T = 1 the plain VAE (Kingma & Welling 2013, arXiv 1312.6114).

    Level n holds :math:`q(x_n | x_{n-1})` and :math:`p(x_{n-1} | x_n)`. The prior is :math:`p(x_T) = N(0, I)`.

    Args:
        hierarchy: the levels, from the data upwards.
        decoder: makes p(x_0 | x_1) of the first level's Gaussian over x_0.
        shape: shape of the data, without the batch.

    Raises:
        InputError: no level, or a level that cannot stand on the one below it.
    """

    def __init__(self, hierarchy: Sequence[Level], decoder: Decoder, shape: Sequence[int]) -> None:
        super().__init__()
        if not hierarchy:
            raise InputError("hierarchy = [] must hold one level at least: with one the model is the plain VAE")
        self.network, self.decoder = nn.ModuleList(hierarchy), decoder
        self.shapes = [tuple(shape)]
        """Shapes of x_0, ..., x_T."""
        for number, level in enumerate(hierarchy, start=1):
            try:
                self.shapes.append(level.stand_on(self.shapes[-1]))
            except InputError as error:
                raise InputError(f"level {number}, {type(level).__name__}: {error}") from error

    @property
    def levels(self) -> list[Level]:
        """The levels, from the data upwards."""
        return cast(list[Level], list(cast(nn.ModuleList, self.network)))

    def _level(self, n: int | Tensor) -> Level:
        return cast(Level, cast(nn.ModuleList, self.network)[int(n) - 1])

    @property
    def T(self) -> int:
        return len(self.shapes) - 1

    def facts(self) -> dict[str, Any]:
        return {"shapes": [list(shape) for shape in self.shapes]}

    def with_steps(self, T: int) -> "HierarchicalVAE":
        if self.T != T:
            raise InputError(f"T = {T}: a hierarchy has one state for each of its {self.T} levels: leave T out")
        return self

    def encoder_step(self, n: int | Tensor, before: Tensor, x0: Tensor) -> DiagonalGaussian:
        return self._level(n).encode(before)

    def encoder_marginal(self, n: int | Tensor, x0: Tensor) -> DiagonalGaussian:
        """:math:`q(x_1 | x_0)`. Of the other states only draws are known."""
        if int(n) != 1:
            raise InputError(f"q(x_{int(n)} | x_0) is not known for learned encoders: evaluate all steps of the bound")
        return self._level(1).encode(x0)

    def reverse(self, n: int | Tensor, after: Tensor, **cond: Any) -> DiagonalGaussian:
        return self._level(int(n) + 1).decode(after, **cond)

    def reconstruction_gaussian(self, x1: Tensor, **cond: Any) -> DiagonalGaussian:
        return self._level(1).decode(x1, **cond)

    def prior(self, like: Tensor) -> DiagonalGaussian:
        return centred_like(like, torch.zeros((), dtype=torch.float64))

    def encoded(self, x0: Tensor, generators: Generators = None) -> list[Tensor]:
        """A draw of x_1, ..., x_T given data, each ``[B, *shapes[n]]``."""
        states = [x0]
        for n in range(1, self.T + 1):
            states.append(self._level(n).encode(states[-1]).sample(generators))
        return states[1:]

    def generate(self, x_n: Tensor, n: int, generators: Generators = None, **cond: Any) -> Tensor:
        """Data ``[B, *shape]`` from a state of level n: draws down the hierarchy, then the decoder's mode.

        From the prior: ``n = T`` and standard normal numbers ``[B, *shapes[T]]``.
        """
        for lower in range(n - 1, 0, -1):
            x_n = self.reverse(lower, x_n, **cond).sample(generators)
        return self.decoder.mode(self.reconstruction_gaussian(x_n, **cond))

    def sample(self, like: Tensor, generators: Generators = None, **cond: Any) -> Tensor:
        """As many draws from the model as ``like`` has rows, on its device: ``[B, *shape]``."""
        x_T = randn_like(like.new_empty(len(like), *self.shapes[-1]), generators)
        return self.generate(x_T, self.T, generators, **cond)
