"""Heun's second-order solver of the probability-flow ODE (Karras et al. 2022, arXiv 2206.00364, algorithm 1)."""

from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.ops import Generators, as_times, expand_to
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.samplers.base import Sampler

__all__ = ["HeunSampler"]


class HeunSampler(Sampler):
    r"""Deterministic; two evaluations of the network a step and one for the decoder, 2 steps - 1 in all.

    In EDM's coordinates y = x / alpha and k = sigma / alpha = exp(gamma/2), of any schedule, the ODE is

        dy / dk = eps-hat

    An Euler step of it is DDIM; Heun's takes the mean of eps-hat at both ends of that step.
    """

    @property
    def is_deterministic(self) -> bool:
        """True."""
        return True

    def evaluations(self, steps: int) -> int:
        """2 steps - 1."""
        return 2 * steps - 1

    def step(
        self,
        model: DiffusionModel,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        generators: Generators = None,
        **cond: Any,
    ) -> Tensor:
        """x_s from x_t; draws nothing."""
        denoiser, schedule = model.reverse_process.denoiser, model.schedule
        eps_t = denoiser(x_t, t, **cond).eps
        s, t = as_times(s, x_t), as_times(t, x_t)
        ratio = torch.exp(schedule.log_alpha(s) - schedule.log_alpha(t))
        # alpha_s (k_s - k_t), negative
        change = schedule.sigma(s) - ratio * schedule.sigma(t)
        kept = expand_to(ratio, x_t).to(x_t.dtype) * x_t
        change = expand_to(change, x_t).to(x_t.dtype)
        eps_s = denoiser(kept + change * eps_t, s, **cond).eps
        return kept + 0.5 * change * (eps_t + eps_s)
