"""Ancestral sampling: the reverse process itself (Ho et al. 2020, algorithm 2)."""

from typing import Any

from torch import Tensor

from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.samplers.base import Sampler

__all__ = ["AncestralSampler"]


class AncestralSampler(Sampler):
    """Each step draws from p(x_s | x_t). On a strided grid the steps' variances are those of the strided chain."""

    def step(
        self,
        model: DiffusionModel,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        generators: Generators = None,
        **cond: Any,
    ) -> Tensor:
        """A draw of x_s ~ p(x_s | x_t)."""
        return model.reverse_process.transition(x_t, s, t, **cond).sample(generators)
