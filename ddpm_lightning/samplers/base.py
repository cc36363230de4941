"""Samplers: from noise to data along a time grid. The grid is an argument of the call, not part of the sampler."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel, Prediction

__all__ = ["Context", "MultistepState", "Sampler", "State"]


@dataclass(frozen=True)
class Context:
    """What is the same in all steps of one call."""

    model: DiffusionModel
    generators: Generators = None
    cond: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, x_t: Tensor, t: Tensor) -> Prediction:
        return self.model.reverse_process.denoiser(x_t, t, **self.cond)


@dataclass(frozen=True)
class MultistepState:
    """What a multistep sampler hands from one step to the next: the scalar time at which the last step began, and the
    prediction ``[B, C, *space]`` of x_0 there."""

    t: Tensor
    x0: Tensor


State = MultistepState | None
"""None before the first step, and from a sampler that needs no more than x_t."""


class Sampler:
    """Base of samplers: subclasses define :meth:`step`. A sampler holds options only and serves many calls at once."""

    @property
    def is_deterministic(self) -> bool:
        """True where the steps draw nothing, so that the image is a function of x_T."""
        return False

    @property
    def follows_reverse_process(self) -> bool:
        """True where the steps follow :math:`p(x_s | x_t)`, drawing its noise: right whatever the model's encoder.

        Solvers of the probability-flow ODE take the denoiser's x0 for :math:`E[m | x_t]`. With a learned encoder it is
        not."""
        return False

    def check(self, model: DiffusionModel) -> None:
        """Raise InputError for a model with an encoder with which the steps would lead elsewhere."""
        if not (model.encoder.is_identity or self.follows_reverse_process):
            raise InputError(
                f"{type(self).__name__} does not know of {type(model.encoder).__name__}, and its images would not be "
                "the model's: use AncestralSampler, DDIMSampler with eta = 1, or DPMSolverSampler with sde = true"
            )

    def evaluations(self, steps: int) -> int:
        """Evaluations of the network on a grid of ``steps`` steps, one of them for a decoder that uses the denoiser."""
        return steps

    def step(self, context: Context, x_t: Tensor, t: Tensor, s: Tensor, state: State = None) -> tuple[Tensor, State]:
        """x_s from x_t for scalar times 0 < s < t, and the ``state`` that the next step is given; None at first."""
        raise NotImplementedError

    def decode(self, context: Context, x1: Tensor, grid: Tensor) -> Tensor:
        """The image at the end: the decoder's mode at ``x1``, the state at ``grid[1]``."""
        model = context.model
        return model.decoder.mode(model.decoder_gaussian(x1, grid, **context.cond))

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
        """Images ``[B, C, *space]`` in model range, from x_T ~ p(x_T), the model's prior.

        The last step is the decoder's mode at the first state of the grid, so an image is made of grey levels.

        Args:
            x_T: ``[B, C, *space]``, the start.
            grid: float64 ``[K + 1]``, increasing from the time of the data to 1, as ``strided_grid``, ``logsnr_grid``
                and ``karras_grid`` make it; None for all T steps of the chain.
            callback: called with (x_s, s) after each step.
        """
        self.check(model)
        grid = model.grid if grid is None else grid
        data = float(model.grid[0])
        if grid.ndim != 1 or len(grid) < 2 or grid[0] != data or grid[-1] != 1 or bool((grid.diff() <= 0).any()):
            raise InputError(f"a sampler's grid must increase from {data:g}, the time of the data, to 1")
        grid = grid.to(x_T.device)
        model, times = model.tabulated(grid[1:].flip(0))
        context = Context(model, generators, cond)
        x, state = x_T, None
        for t, s in pairwise(times):
            x, state = self.step(context, x, t, s, state)
            if callback is not None:
                callback(x, s)
        x0 = self.decode(context, x, grid)
        if callback is not None:
            callback(x0, grid[0])
        return x0
