r"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): linear in x_t exactly, a polynomial in the prediction of x_0.

With :math:`\lambda = \log(\alpha/\sigma) = -\gamma/2` and a step :math:`h = \lambda_s - \lambda_t > 0`, the
probability-flow ODE is solved by

.. math::

    x_s = \tfrac{\sigma_s}{\sigma_t} x_t + \sigma_s
        \int_{\lambda_t}^{\lambda_s} e^\lambda \, \hat x_0(\lambda) \, d\lambda

and the reverse SDE, of the same marginals, by

.. math::

    x_s = \tfrac{\sigma_s}{\sigma_t} e^{-h} x_t + 2 \sigma_s e^{-\lambda_s}
        \int_{\lambda_t}^{\lambda_s} e^{2\lambda} \, \hat x_0(\lambda) \, d\lambda
        + \sigma_s \sqrt{1 - e^{-2h}} \, z, \qquad z \sim N(0, I)

In place of :math:`\hat x_0(\lambda)` order 1 takes :math:`\hat x_0` at t, and order 2 (2M) its extrapolation to the
middle of the step:

.. math:: D = \hat x_{0,t} + \frac{h}{2 h_\text{before}} (\hat x_{0,t} - \hat x_{0,\text{before}})

so that the ODE's integral term becomes :math:`\alpha_s (1 - e^{-h}) D`, and the SDE's :math:`\alpha_s (1 - e^{-2h}) D`.
"""

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import as_times, expand_to, randn_like
from ddpm_lightning.samplers.base import Context, MultistepState, Sampler, State

__all__ = ["DPMSolverSampler"]


class DPMSolverSampler(Sampler):
    """DPM-Solver++, its multistep form 2M at order 2, for any schedule; one evaluation of the network a step.

    Order 1 is DDIM with eta = 0, and as an SDE the ancestral sampler with its small variance. The first step is always
    of order 1. The decoder makes the last step, as for all samplers.

    Args:
        order: 1 or 2.
        sde: draw noise at each step (SDE-DPM-Solver++).
    """

    def __init__(self, order: int = 2, sde: bool = False) -> None:
        if order not in (1, 2):
            raise InputError(f"order = {order} must be 1 or 2")
        self.order, self.sde = order, sde

    @property
    def is_deterministic(self) -> bool:
        return not self.sde

    @property
    def follows_reverse_process(self) -> bool:
        return self.sde

    def step(self, context: Context, x_t: Tensor, t: Tensor, s: Tensor, state: State = None) -> tuple[Tensor, State]:
        x0_t = context.predict(x_t, t).x0
        s, t = as_times(s, x_t), as_times(t, x_t)
        schedule = context.model.schedule
        gamma_t = schedule.gamma(t)
        h = 0.5 * (gamma_t - schedule.gamma(s))
        x0 = x0_t
        if self.order == 2 and state is not None:
            h_before = 0.5 * (schedule.gamma(as_times(state.t, x_t)) - gamma_t)
            x0 = x0_t + expand_to(0.5 * h / h_before, x_t).to(x_t.dtype) * (x0_t - state.x0)
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
            x_s = x_s + noise_scale * randn_like(x_t, context.generators)
        return x_s, MultistepState(t, x0_t)
