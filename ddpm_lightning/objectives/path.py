r"""Log probabilities of the single states of a chain: along one path, and the bound of a state by itself.

A path :math:`x_1, \dots, x_T` of q ties every log probability of the chain together. From the data x_0 (n = 0) or any
state x_n:

.. math::

    \log p(x_n) \ge E_{q(x_{n+1}, \dots, x_T | x_n)} \left[ \log p(x_T)
        + \sum_{m=n+1}^T \log p(x_{m-1}|x_m) - \log q(x_m|x_{m-1}) \right]

where :math:`p(x_n)` is the model's own marginal and :math:`\log p(x_0|x_1)` is the decoder's. The gap is the KL
divergence of :math:`q(x_{n+1}, \dots, x_T | x_n)` from :math:`p(x_{n+1}, \dots, x_T | x_n)`. At n = 0 this is the
trajectory form of the bound, at n = T it is log p(x_T) itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel

__all__ = ["PathLogProbs", "path_log_probs", "state_bound"]


@dataclass(frozen=True)
class PathLogProbs:
    r"""Log probabilities along one path :math:`x_1, \dots, x_T` for each image; column i belongs to the state
    :math:`x_{i+1}`.

    Log probabilities are float64 nats for a whole image.
    """

    log_q_marginal: Tensor  # log q(x_t|x_0), [B, T]
    log_q_step: Tensor  # log q(x_t|x_{t-1}), [B, T]
    log_p_step: Tensor  # log p(x_t|x_{t+1}), and in the last column the prior's log p(x_T), [B, T]
    log_p_data: Tensor  # log p(x_0|x_1), [B]
    times: Tensor  # t of x_1, ..., x_T, float64 [T]
    gamma: Tensor  # -log SNR of x_1, ..., x_T, its mean over pixels, float64 [T]

    @property
    def elbo(self) -> Tensor:
        r"""The path's estimate of the bound, ``[B]``:

        .. math:: \log p(x_0, \dots, x_T) - \log q(x_1, \dots, x_T | x_0)
        """
        return self.log_p_data + self.log_p_step.sum(1) - self.log_q_step.sum(1)


def path_log_probs(model: DiffusionModel, x0: Tensor, generators: Generators = None, **cond: Any) -> PathLogProbs:
    """Every log probability of one path of the model's chain, with T evaluations of the network.

    The path is the one that ``TrajectoryElbo`` draws. One step is kept at a time, so memory grows with T by the
    ``[B, T]`` results only (without gradients). For another number of states give ``model.with_steps(T)``.
    """
    times = model.grid[1:].to(x0.device)
    q_marginals, q_steps, p_steps = [], [], []
    for t, (x_t, log_q, log_p) in zip(times, _steps(model, x0, 0, generators, cond), strict=True):
        q_marginals.append(model.forward_process.marginal(x0, t).log_prob(x_t))
        q_steps.append(log_q)
        p_steps.append(log_p)
    p_steps.append(model.prior(x0).log_prob(x_t))
    log_q_marginal, log_q_step, log_p_step = (torch.stack(each, 1) for each in (q_marginals, q_steps, p_steps[1:]))
    return PathLogProbs(log_q_marginal, log_q_step, log_p_step, p_steps[0], times, model.schedule.mean_gamma(times))


def state_bound(
    model: DiffusionModel, x_n: Tensor, index: int, generators: Generators = None, paths: int = 1, **cond: Any
) -> Tensor:
    r"""Estimates of the lower bound on :math:`\log p(x_n)`, float64 nats ``[paths, B]``. Their mean over paths has no
    bias.

    Args:
        x_n: states of step n of the chain, ``[B, C, *space]``, however they came about.
        index: n in 0..T; 0 for data, whose bound is the ELBO.
        paths: number of paths from each state, at least 1, each with T - n evaluations of the network.

    Raises:
        InputError: an index out of its range, or above 0 with an encoder that is not the identity.
    """
    if not 0 <= index <= model.T:
        raise InputError(f"index = {index} must lie between 0 (data) and the chain's T = {model.T}")
    at_least(1, paths=paths)
    prior = model.prior(x_n)
    bounds = []
    for _ in range(paths):
        last, log_ratio = x_n, torch.zeros(len(x_n), dtype=torch.float64, device=x_n.device)
        for x_m, log_q, log_p in _steps(model, x_n, index, generators, cond):
            last, log_ratio = x_m, log_ratio + log_p - log_q
        bounds.append(prior.log_prob(last) + log_ratio)
    return torch.stack(bounds)


def _steps(
    model: DiffusionModel, x_n: Tensor, index: int, generators: Generators, cond: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    r"""The states after x_n: x_m ``[B, C, *space]``, :math:`\log q(x_m|x_{m-1})` and :math:`\log p(x_{m-1}|x_m)`
    ``[B]``, m = n+1..T."""
    process, grid = model.forward_process, model.grid.to(x_n.device)
    before, s = x_n, grid[index]
    states = process.path(x_n, grid[index + 1 :], generators, start=grid[index] if index else None)
    for m, x_t in enumerate(states, start=index + 1):
        log_q = process.transition(before, s, grid[m], None if index else x_n).log_prob(x_t)
        if m == 1:
            log_p = model.decoder.log_prob(x_n, model.decoder_gaussian(x_t, **cond))
        else:
            log_p = model.reverse_process.transition(x_t, s, grid[m], **cond).log_prob(before)
        yield x_t, log_q, log_p
        before, s = x_t, grid[m]
