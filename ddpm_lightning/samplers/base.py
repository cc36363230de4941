"""Samplers walk a time grid from noise to data. A solver's grid is an argument of the call, not part of the solver."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel

__all__ = ["Memory", "Sampler"]


@dataclass(frozen=True)
class Memory:
    """What a multistep sampler hands from one step of a walk to the next.

    Attributes:
        t: the time that the last step left from, float64, a scalar.
        x0: x0-hat there, ``[B, C, H, W]``.
    """

    t: Tensor
    x0: Tensor


class Sampler:
    """Base of samplers: subclasses define :meth:`step`, multistep ones :meth:`advance`.

    They hold options and nothing of a walk, so one object serves any number of walks at once."""

    @property
    def is_deterministic(self) -> bool:
        """True where the steps draw nothing, so that the image is a function of x_T."""
        return False

    def evaluations(self, steps: int) -> int:
        """Evaluations of the network on a grid of ``steps`` steps, one of them the decoder's (which is none for a
        decoder without a denoiser)."""
        return steps

    def step(
        self,
        model: DiffusionModel,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        generators: Generators = None,
        **cond: Any,
    ) -> Tensor:
        """x_s from x_t ``[B, C, H, W]``, for scalar times 0 < s < t."""
        raise NotImplementedError

    def advance(
        self,
        model: DiffusionModel,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        memory: Memory | None = None,
        generators: Generators = None,
        **cond: Any,
    ) -> tuple[Tensor, Memory | None]:
        """:meth:`step` with the memory of the step before (None at the first): x_s and the memory for the next."""
        return self.step(model, x_t, t, s, generators, **cond), None

    def decode(self, model: DiffusionModel, x1: Tensor, grid: Tensor, **cond: Any) -> Tensor:
        """The image that the walk ends with: the decoder's mode at ``x1``, the state at ``grid[1]``."""
        return model.decoder.mode(model.decoder_gaussian(x1, grid, **cond))

    def __call__(
        self,
        model: DiffusionModel,
        x_T: Tensor,
        *,
        grid: Tensor | None = None,
        generators: Generators = None,
        callback: Callable[[Tensor, Tensor], None] | None = None,
        **cond: Any,
    ) -> Tensor:
        """Walk from x_T ~ p(x_T), the model's prior, to an image.

        The walk ends with the decoder's mode at the grid's first time above 0, so every image is made of grey levels.

        Args:
            model: the generative model.
            x_T: ``[B, C, H, W]``, the start.
            grid: float64 ``[K + 1]``, increasing from the time of the data to 1, for ``evaluations(K)`` evaluations of
                the network (``strided_grid``, ``logsnr_grid`` and ``karras_grid`` make one); None for all T steps of
                the chain.
            generators: source of the noise of the steps.
            callback: called with (x_s, s) after each step.
            cond: conditions, passed on to the network.

        Returns:
            Images ``[B, C, H, W]`` in model range.

        Raises:
            InputError: a grid that does not increase from the time of the data to 1.
        """
        grid = model.grid if grid is None else grid
        data = float(model.grid[0])
        if grid.ndim != 1 or len(grid) < 2 or grid[0] != data or grid[-1] != 1 or bool((grid.diff() <= 0).any()):
            raise InputError(f"a sampler's grid must increase from {data:g}, the time of the data, to 1")
        x = x_T
        memory: Memory | None = None
        times = grid.flip(0).to(x.device)
        for t, s in pairwise(times[:-1]):
            x, memory = self.advance(model, x, t, s, memory, generators, **cond)
            if callback is not None:
                callback(x, s)
        x0 = self.decode(model, x, grid.to(x.device), **cond)
        if callback is not None:
            callback(x0, times[-1])
        return x0
