"""From a density to a probability of grey levels, the only way in which a density becomes bits of discrete data."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators, randn_like
from ddpm_lightning.process import DiffusionModel

__all__ = ["decoded_log_prob", "dequantized_log_prob"]


def dequantized_log_prob(
    log_density: Callable[[Tensor], Tensor], x0: Tensor, levels: int, generators: Generators = None
) -> Tensor:
    r"""An estimate, from one draw of u, of a lower bound on the log probability of grey levels by uniform
    dequantisation (Theis et al. 2016, arXiv 1511.01844, section 3.1).

    Level k sits at x_k = 2 k / (levels - 1) - 1, the middle of a bin of width delta = 2 / (levels - 1). For a model of
    images that draws x from the density and rounds it to the nearest level

    .. math::

        \log P(k) \ge E_u \left[ \log p(x_k + \delta (u - \tfrac12)) \right] + D \log \delta,
            \qquad u \text{ uniform in } [0, 1)^D

    so a density uniform on the levels' bins, (levels delta)^-D, has log2(levels) bits/dim exactly. ``bits_per_dim``
    turns the nats into bits/dim.

    Args:
        log_density: images ``[B, C, H, W]`` in model range, float64 -> ``[B]`` nats.
        x0: images at grey levels, ``[B, C, H, W]`` in model range.
        levels: number of grey levels, at least 2.

    Returns:
        float64 ``[B]`` nats.
    """
    if levels < 2:
        raise InputError(f"levels = {levels} must be 2 or more: only grey levels can be dequantised")
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
    r"""The same by variational dequantisation (Ho et al. 2019, arXiv 1902.00275, section 3.1), with the forward process
    for the noise and the model's decoder for the rounding:

    .. math::

        \log P(x_0) \ge E_q \left[ \log p(x_1) + \log P(x_0 | x_1) - \log q(x_1 | x_0) \right],
            \qquad x_1 \sim q(x_1 | x_0)

    It asks for the density where the denoiser was trained to be good. Where the decoder is the exact posterior of x_0
    and p(x_1) is q(x_1), every draw gives log P(x_0) itself.

    Args:
        log_density: states x_1 ``[B, C, H, W]`` -> ``[B]`` nats, as ``ProbabilityFlow.log_likelihood`` gives it.
        model: the generative model; its decoder says what kind of bound this is (of grey levels, or of a density).
        cond: conditions, passed on to the network by the decoder.

    Returns:
        float64 ``[B]`` nats.
    """
    x0 = x0.double()
    q = model.forward_process.marginal(x0, model.grid[1].to(x0.device))
    x1 = q.sample(generators)
    reconstruction = model.decoder.log_prob(x0, model.decoder_gaussian(x1, **cond))
    return log_density(x1) + reconstruction - q.log_prob(x1)
