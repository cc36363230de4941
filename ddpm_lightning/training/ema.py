"""The exponential moving average of a model's weights."""

import torch
from torch import nn

from ddpm_lightning.training.sharding import local_part

__all__ = ["WeightAverage", "decay_at"]


def decay_at(step: int, decay: float) -> float:
    """Decay after ``step`` >= 1 optimiser steps: min(decay, (1 + step) / (10 + step)).

    A young average follows closely, so that it is not one of random weights (after tf.train.ExponentialMovingAverage).
    A decay of 0 stays 0.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """Keeps ``average``, a deep copy of ``model``, an average of its parameters and floating-point buffers.

    The average may be more precise than the model: one in half precision would lose most of what a step adds to it.
    Buffers of other types are copied. Of sharded tensors each process averages its part. The tensors are looked up once
    (for a small U-Net that takes longer than the update): make it when both models are on their device, and anew after
    a move.
    """

    def __init__(self, average: nn.Module, model: nn.Module) -> None:
        pairs = [
            *zip(average.parameters(), model.parameters(), strict=True),
            *zip(average.buffers(), model.buffers(), strict=True),
        ]
        self._averages = [local_part(a) for a, _ in pairs if a.is_floating_point()]
        self._weights = [local_part(m) for a, m in pairs if a.is_floating_point()]
        self._copies = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average <- decay average + (1 - decay) model, in place."""
        weights = [m.to(a.dtype) for a, m in zip(self._averages, self._weights, strict=True)]
        torch._foreach_lerp_(self._averages, weights, 1 - decay)
        for a, m in self._copies:
            a.copy_(m)
