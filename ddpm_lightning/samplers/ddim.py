"""DDIM (Song et al. 2021, arXiv 2010.02502): good images from few evaluations."""

from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators, as_times, expand_to, randn_like
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.samplers.base import Sampler

__all__ = ["DDIMSampler"]


class DDIMSampler(Sampler):
    """x_s = alpha_s x0-hat + sqrt(sigma_s^2 - v) eps-hat + sqrt(v) noise, v = eta^2 beta-tilde (equation 12, 16).

    Args:
        eta: 0 is deterministic, 1 has the ancestral sampler's small variance.

    Raises:
        InputError: eta outside [0, 1].
    """

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise InputError(f"eta = {eta:g} must lie between 0 and 1")
        self.eta = eta

    @property
    def is_deterministic(self) -> bool:
        """True for eta = 0."""
        return self.eta == 0

    def step(
        self,
        model: DiffusionModel,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        generators: Generators = None,
        **cond: Any,
    ) -> Tensor:
        """x_s from x_t; draws noise only where eta > 0."""
        prediction = model.reverse_process.denoiser(x_t, t, **cond)
        s, t = as_times(s, x_t), as_times(t, x_t)
        schedule = model.schedule
        alpha_s, sigma_s = schedule.scales(s, x_t)
        if self.eta == 0:
            return alpha_s * prediction.x0 + sigma_s * prediction.eps
        noise_var = self.eta**2 * torch.exp(schedule.log_posterior_var(s, t))
        eps_scale = torch.sqrt(torch.exp(schedule.log_sigma2(s)) - noise_var)
        x_s = alpha_s * prediction.x0 + _scaled(eps_scale, prediction.eps)
        return x_s + _scaled(noise_var.sqrt(), randn_like(x_t, generators))


def _scaled(scale: Tensor, x: Tensor) -> Tensor:
    """A float64 scale, ``[]`` or ``[B]``, times images in their own dtype."""
    return expand_to(scale, x).to(x.dtype) * x
