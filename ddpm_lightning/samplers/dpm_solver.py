r"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): linear in x_t exactly, a polynomial in the prediction of x_0.

With lambda = log(alpha/sigma) = -gamma/2 and a step h = lambda_s - lambda_t > 0, the probability-flow ODE is solved by

    x_s = sigma_s/sigma_t x_t + sigma_s int_{lambda_t}^{lambda_s} e^lambda x0-hat(lambda) d lambda

and the reverse SDE, of the same marginals, by

    x_s = sigma_s/sigma_t e^-h x_t + 2 sigma_s e^-lambda_s int e^{2 lambda} x0-hat d lambda
          + sigma_s sqrt(1 - e^{-2h}) noise

In place of x0-hat(lambda) order 1 takes x0-hat at t, and order 2 (2M) its extrapolation to the middle of the step:

    D = x0-hat_t + h / (2 h_before) (x0-hat_t - x0-hat_before)

    ODE: x_s = sigma_s/sigma_t x_t + alpha_s (1 - e^-h) D
    SDE: x_s = sigma_s/sigma_t e^-h x_t + alpha_s (1 - e^{-2h}) D + sigma_s sqrt(1 - e^{-2h}) noise
"""

from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators, as_times, expand_to, randn_like
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.samplers.base import Memory, Sampler

__all__ = ["DPMSolverSampler"]


class DPMSolverSampler(Sampler):
    """DPM-Solver++, its multistep form 2M at order 2, for any schedule; one evaluation of the network a step.

    Order 1 is DDIM with eta = 0, and as an SDE the ancestral sampler with its small variance. The first step of a walk
    has nothing to extrapolate from and is of order 1. The decoder makes the last step, as for all samplers.

    Args:
        order: 1 or 2.
        sde: draw noise at each step (SDE-DPM-Solver++).

    Raises:
        InputError: another order.
    """

    def __init__(self, order: int = 2, sde: bool = False) -> None:
        if order not in (1, 2):
            raise InputError(f"order = {order} must be 1 or 2")
        self.order, self.sde = order, sde

    @property
    def is_deterministic(self) -> bool:
        """True unless ``sde``."""
        return not self.sde

    def step(
        self,
        model: DiffusionModel,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        generators: Generators = None,
        **cond: Any,
    ) -> Tensor:
        """x_s from x_t alone: the step of order 1 that a walk begins with."""
        return self.advance(model, x_t, t, s, None, generators, **cond)[0]

    def advance(
        self,
        model: DiffusionModel,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        memory: Memory | None = None,
        generators: Generators = None,
        **cond: Any,
    ) -> tuple[Tensor, Memory | None]:
        """x_s from x_t and the prediction of the step before; draws noise only where ``sde``."""
        x0_t = model.reverse_process.denoiser(x_t, t, **cond).x0
        s, t = as_times(s, x_t), as_times(t, x_t)
        schedule = model.schedule
        gamma_t = schedule.gamma(t)
        h = 0.5 * (gamma_t - schedule.gamma(s))
        x0 = x0_t
        if self.order == 2 and memory is not None:
            h_before = 0.5 * (schedule.gamma(as_times(memory.t, x_t)) - gamma_t)
            x0 = x0_t + expand_to(0.5 * h / h_before, x_t).to(x_t.dtype) * (x0_t - memory.x0)
        log_sigma_s, log_sigma_t = 0.5 * schedule.log_sigma2(s), 0.5 * schedule.log_sigma2(t)
        rate = 2 if self.sde else 1
        scales = (
            torch.exp(log_sigma_s - log_sigma_t - (rate - 1) * h),
            schedule.alpha(s) * -torch.expm1(-rate * h),
            torch.exp(log_sigma_s) * torch.sqrt(-torch.expm1(-2 * h)),
        )
        scale_t, scale_x0, noise_scale = (expand_to(value, x_t).to(x_t.dtype) for value in scales)
        x_s = scale_t * x_t + scale_x0 * x0
        if self.sde:
            x_s = x_s + noise_scale * randn_like(x_t, generators)
        return x_s, Memory(t, x0_t)
