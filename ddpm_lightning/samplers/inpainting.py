"""Inpainting: the known pixels are put into every state, or into the score."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least, positive
from ddpm_lightning.ops import expand_mask
from ddpm_lightning.process import LinearMeasurement, MaskOperator, MMPSDenoiser
from ddpm_lightning.samplers.base import Context, Sampler, State

__all__ = ["InpaintingFactory", "InpaintingSampler", "MomentMatchingSampler", "ReplacementSampler"]


class InpaintingSampler(Sampler):
    """Base of samplers that draw the unknown pixels of images. In the end the other pixels are exactly ``known``.

    Args:
        sampler: takes the steps.
        known: images in model range, ``[B, C, *space]``, or ``[1, C, *space]`` for one for all; any finite value where
            they are not known.
        mask: bool, True where a pixel is known: ``[C or 1, *space]`` for all images or ``[B or 1, C or 1, *space]``.
    """

    def __init__(self, sampler: Sampler, known: Tensor, mask: Tensor) -> None:
        self.sampler, self.known, self.mask = sampler, known, mask

    def decode(self, context: Context, x1: Tensor, grid: Tensor) -> Tensor:
        mask, known = self._known(x1)
        return torch.where(mask, known, self.sampler.decode(context, x1, grid))

    def _known(self, like: Tensor) -> tuple[Tensor, Tensor]:
        known = self.known.to(like)
        if known.shape[1:] != like.shape[1:] or known.shape[0] not in (1, like.shape[0]):
            raise InputError(f"known images of shape {list(known.shape)} do not fit samples {list(like.shape)}")
        return expand_mask(self.mask, like), known.expand_as(like)


InpaintingFactory = Callable[[Sampler, Tensor, Tensor], InpaintingSampler]
"""(sampler, known, mask) -> the sampler that draws the rest: a class of this file, or a partial of one."""


class ReplacementSampler(InpaintingSampler):
    r"""Any sampler, with the known pixels of each x_s replaced by a draw of :math:`q(x_s | x_0 = \text{known})`.

    With ``resamplings`` = 1 (Song et al. 2021, arXiv 2011.13456, appendix I.2) the known pixels of x_s do not depend on
    the unknown pixels of x_t, and the samples do not follow :math:`p(x_0 | \text{known})`. RePaint (Lugmayr et al.
    2022, arXiv 2201.09865, algorithm 1) takes each step several times: it goes back from x_s to x_t by
    :math:`q(x_t | x_s)`, one step and not the paper's ten, and draws x_s again. This takes x_s towards its distribution
    given the known pixels.

    Args:
        resamplings: how often each step is taken, at least 1.
    """

    def __init__(self, sampler: Sampler, known: Tensor, mask: Tensor, resamplings: int = 1) -> None:
        at_least(1, "how often each step is taken", resamplings=resamplings)
        super().__init__(sampler, known, mask)
        self.resamplings = resamplings

    def evaluations(self, steps: int) -> int:
        return self.resamplings * (self.sampler.evaluations(steps) - 1) + 1

    def step(self, context: Context, x_t: Tensor, t: Tensor, s: Tensor, state: State = None) -> tuple[Tensor, State]:
        mask, known = self._known(x_t)
        forward, generators = context.model.forward_process, context.generators

        def once(x_t: Tensor) -> tuple[Tensor, State]:
            x_s, after = self.sampler.step(context, x_t, t, s, state)
            return torch.where(mask, forward.marginal(known, s).sample(generators), x_s), after

        x_s, after = once(x_t)
        for _ in range(self.resamplings - 1):
            x_s, after = once(forward.transition(x_s, s, t).sample(generators))
        return x_s, after


class MomentMatchingSampler(InpaintingSampler):
    r"""Any sampler, run with the score of :math:`p(x_t | \text{known pixels})` as :class:`MMPSDenoiser` approximates
    it.

    Each evaluation of the network comes with ``iterations`` + 1 gradients.

    Args:
        iterations: of conjugate gradients, at least 1.
        noise_var: variance with which the known pixels are believed, in the square of model range; positive.
    """

    def __init__(
        self, sampler: Sampler, known: Tensor, mask: Tensor, iterations: int = 5, noise_var: float = 1e-3
    ) -> None:
        super().__init__(sampler, known, mask)
        self.iterations, self.noise_var = iterations, noise_var
        positive("the variance with which the known pixels are believed", noise_var=noise_var)
        at_least(1, "steps of conjugate gradients", iterations=iterations)

    @property
    def is_deterministic(self) -> bool:
        return self.sampler.is_deterministic

    def evaluations(self, steps: int) -> int:
        """As for the wrapped sampler, gradients not counted."""
        return self.sampler.evaluations(steps)

    def step(self, context: Context, x_t: Tensor, t: Tensor, s: Tensor, state: State = None) -> tuple[Tensor, State]:
        return self.sampler.step(self._conditioned(context, x_t), x_t, t, s, state)

    def decode(self, context: Context, x1: Tensor, grid: Tensor) -> Tensor:
        return super().decode(self._conditioned(context, x1), x1, grid)

    def _conditioned(self, context: Context, like: Tensor) -> Context:
        operator = MaskOperator(self.mask)
        measurement = LinearMeasurement(operator, operator.apply(self._known(like)[1]), self.noise_var)
        model = context.model.with_denoiser(lambda denoiser: MMPSDenoiser(denoiser, measurement, self.iterations))
        return replace(context, model=model)
