import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import as_times, expand_to, randn_like
from ddpm_lightning.samplers.base import Context, Sampler, State

__all__ = ["DDIMSampler"]


class DDIMSampler(Sampler):
    r"""DDIM (Song et al. 2021, arXiv 2010.02502, equations 12 and 16): good images from few evaluations.

    .. math::

        x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - v} \, \hat\epsilon + \sqrt{v} \, z,
            \qquad v = \eta^2 \tilde\beta, \quad z \sim N(0, I)

    Args:
        eta: from 0, deterministic, to 1, the ancestral sampler's small variance.
    """

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise InputError(f"eta = {eta:g} must lie between 0 and 1")
        self.eta = eta

    @property
    def is_deterministic(self) -> bool:
        return self.eta == 0

    @property
    def follows_reverse_process(self) -> bool:
        return self.eta == 1

    def step(self, context: Context, x_t: Tensor, t: Tensor, s: Tensor, state: State = None) -> tuple[Tensor, State]:
        prediction = context.predict(x_t, t)
        s, t = as_times(s, x_t), as_times(t, x_t)
        schedule = context.model.schedule
        alpha_s, sigma_s = schedule.scales(s, x_t)
        if self.eta == 0:
            return alpha_s * prediction.x0 + sigma_s * prediction.eps, None
        noise_var = self.eta**2 * torch.exp(schedule.log_posterior_var(s, t))
        eps_scale = torch.sqrt(torch.exp(schedule.log_sigma2(s)) - noise_var)
        x_s = alpha_s * prediction.x0 + _scaled(eps_scale, prediction.eps)
        return x_s + _scaled(noise_var.sqrt(), randn_like(x_t, context.generators)), None


def _scaled(scale: Tensor, x: Tensor) -> Tensor:
    return expand_to(scale, x).to(x.dtype) * x
