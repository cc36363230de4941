"""The exponential moving average of a model's weights."""

import torch
from torch import nn

__all__ = ["decay_at", "update_average"]


def decay_at(step: int, decay: float) -> float:
    """Decay after ``step`` >= 1 optimiser steps: min(decay, (1 + step) / (10 + step)).

    A young average follows closely, so that it is not one of random weights (after tf.train.ExponentialMovingAverage).
    A decay of 0 stays 0.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) model, in place, for parameters and floating-point buffers.

    Buffers of other types are copied. ``average`` is a deep copy of ``model``.
    """
    pairs = [
        *zip(average.parameters(), model.parameters(), strict=True),
        *zip(average.buffers(), model.buffers(), strict=True),
    ]
    moving = [(a, m) for a, m in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in moving], [m for _, m in moving], 1 - decay)
    for a, m in pairs:
        if not a.is_floating_point():
            a.copy_(m)
