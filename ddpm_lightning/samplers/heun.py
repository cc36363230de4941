import torch
from torch import Tensor

from ddpm_lightning.ops import as_times, expand_to
from ddpm_lightning.samplers.base import Context, Sampler, State

__all__ = ["HeunSampler"]


class HeunSampler(Sampler):
    r"""Heun's second-order solver of the probability-flow ODE (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

    In EDM's coordinates :math:`y = x / \alpha` and :math:`k = \sigma / \alpha = e^{\gamma/2}`, for any schedule, the
    ODE is :math:`dy / dk = \hat\epsilon`. An Euler step of it is DDIM. Heun's step takes the mean of eps-hat at both
    ends of that step. A step costs two evaluations of the network, the decoder one: 2 steps - 1 in all.
    """

    @property
    def is_deterministic(self) -> bool:
        return True

    def evaluations(self, steps: int) -> int:
        return 2 * steps - 1

    def step(self, context: Context, x_t: Tensor, t: Tensor, s: Tensor, state: State = None) -> tuple[Tensor, State]:
        schedule = context.model.schedule
        eps_t = context.predict(x_t, t).eps
        s, t = as_times(s, x_t), as_times(t, x_t)
        ratio = torch.exp(schedule.log_alpha(s) - schedule.log_alpha(t))
        # alpha_s (k_s - k_t), negative
        change = schedule.sigma(s) - ratio * schedule.sigma(t)
        kept = expand_to(ratio, x_t).to(x_t.dtype) * x_t
        change = expand_to(change, x_t).to(x_t.dtype)
        eps_s = context.predict(kept + change * eps_t, s).eps
        return kept + 0.5 * change * (eps_t + eps_s), None
