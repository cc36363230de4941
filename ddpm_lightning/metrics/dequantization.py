"""From a density of images to lower bounds on the log probability of their grey levels, float64 ``[B]`` nats."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import at_least
from ddpm_lightning.ops import Generators, randn_like
from ddpm_lightning.process import DiffusionModel

__all__ = ["decoded_log_prob", "dequantized_log_prob"]


def dequantized_log_prob(
    log_density: Callable[[Tensor], Tensor], x0: Tensor, levels: int, generators: Generators = None
) -> Tensor:
    r"""The bound by uniform dequantisation, from one draw of u (Theis et al. 2016, arXiv 1511.01844, section 3.1).

    Level k sits at x_k = 2 k / (levels - 1) - 1, the middle of a bin of width delta = 2 / (levels - 1). For a model of
    images that draws x from the density and rounds it to the nearest level

    .. math::

        \log P(k) \ge E_u \left[ \log p(x_k + \delta (u - \tfrac12)) \right] + D \log \delta,
            \qquad u \text{ uniform in } [0, 1)^D

    so a density uniform on the levels' bins, (levels delta)^-D, has log2(levels) bits/dim exactly.

    Args:
        log_density: images ``[B, C, *space]`` in model range, float64 -> ``[B]`` nats.
        x0: images at grey levels.
        levels: number of grey levels, at least 2.
    """
    at_least(2, "only grey levels can be dequantised", levels=levels)
    delta = 2 / (levels - 1)
    uniform = torch.special.ndtr(randn_like(x0.double(), generators))
    return log_density(x0.double() + delta * (uniform - 0.5)) + x0[0].numel() * math.log(delta)


def decoded_log_prob(
    log_density: Callable[[Tensor], Tensor],
    model: DiffusionModel,
    x0: Tensor,
    generators: Generators = None,
    **cond: Any,
) -> Tensor:
    r"""The bound by variational dequantisation (Ho et al. 2019, arXiv 1902.00275, section 3.1), with the forward
    process for the noise and the model's decoder for the rounding, from one draw of x_1 ~ q(x_1 | x_0):

    .. math:: \log P(x_0) \ge E_q \left[ \log p(x_1) + \log P(x_0 | x_1) - \log q(x_1 | x_0) \right]

    It asks for the density where the denoiser was trained to be good. Where the decoder is the exact posterior of x_0
    and p(x_1) is q(x_1), every draw gives log P(x_0) itself. The decoder says what kind of bound this is: of grey
    levels, or of a density.

    ``log_density`` maps states x_1 ``[B, C, *space]`` to ``[B]`` nats, as ``ProbabilityFlow.log_likelihood`` does.
    """
    x0 = x0.double()
    q = model.forward_process.marginal(x0, model.grid[1].to(x0.device))
    x1 = q.sample(generators)
    reconstruction = model.decoder.log_prob(x0, model.decoder_gaussian(x1, **cond))
    return log_density(x1) + reconstruction - q.log_prob(x1)
