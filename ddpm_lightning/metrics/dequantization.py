"""From a density to a probability of grey levels, the only way in which a density becomes bits of discrete data."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators, randn_like

__all__ = ["dequantized_log_prob"]


def dequantized_log_prob(
    log_density: Callable[[Tensor], Tensor], x0: Tensor, levels: int, generators: Generators = None
) -> Tensor:
    r"""An estimate, from one draw of u, of a lower bound on the log probability of grey levels by uniform
    dequantisation (Theis et al. 2016, arXiv 1511.01844, section 3.1).

    Level k sits at x_k = 2 k / (levels - 1) - 1, the middle of a bin of width delta = 2 / (levels - 1). For a model of
    images that draws x from the density and rounds it to the nearest level

        log P(k) >= E_u [ log p(x_k + delta (u - 1/2)) ] + D log delta,    u uniform in [0, 1)^D

    so a density uniform on the levels' bins, (levels delta)^-D, has log2(levels) bits/dim exactly. ``bits_per_dim``
    turns the nats into bits/dim.

    Args:
        log_density: images ``[B, C, H, W]`` in model range, float64 -> ``[B]`` nats.
        x0: images at grey levels, ``[B, C, H, W]`` in model range.
        levels: number of grey levels, at least 2.
        generators: source of u.

    Returns:
        float64 ``[B]`` nats.

    Raises:
        InputError: ``levels`` < 2.
    """
    if levels < 2:
        raise InputError(f"levels = {levels} must be 2 or more: only grey levels can be dequantised")
    delta = 2 / (levels - 1)
    uniform = torch.special.ndtr(randn_like(x0.double(), generators))
    return log_density(x0.double() + delta * (uniform - 0.5)) + x0[0].numel() * math.log(delta)
