r"""Samples with the log ratio of their path: what makes a model's samples those of a target density.

A path :math:`x_T, \dots, x_0` drawn from the model, and the encoder's density of the same path given its data, give

.. math:: \log r = \log q(x_1, \dots, x_T | x_0) - \log p(x_0, \dots, x_T)

For any function f, :math:`E_p[r f(x_0)] = \int f(x_0) \, dx_0`. So :math:`w = r \, \tilde\pi(x_0)` weighs the samples
to the target :math:`\tilde\pi / Z`, and the mean of w is Z (VT-DIS, arXiv 2505.21005; Sohl-Dickstein et al. 2015, arXiv
1503.03585, section 2.4). The path is that of the trajectory form of the bound, drawn from its other end.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import GenerativeModel

__all__ = ["WeightedPaths", "draw_paths", "effective_sample_size", "log_mean_weight"]


@dataclass(frozen=True)
class WeightedPaths:
    """Data x_0 ``[B, C, *space]`` in model range, and the log ratio of each one's path, float64 ``[B]`` nats."""

    x0: Tensor
    log_ratio: Tensor


@torch.no_grad()
def draw_paths(model: GenerativeModel, x_T: Tensor, generators: Generators = None, **cond: Any) -> WeightedPaths:
    """Ancestral samples of the model, with T evaluations of the network and all T states in memory.

    Args:
        model: a diffusion model or a hierarchy.
        x_T: draws from ``model.prior``, ``[B, ...]``.
        generators: draw the steps.
        cond: conditions of the model.
    """
    states, log_p = [x_T], model.prior(x_T).log_prob(x_T)
    for n in range(model.T - 1, 0, -1):
        step = model.reverse(n, states[-1], **cond)
        states.append(step.sample(generators))
        log_p = log_p + step.log_prob(states[-1])
    gaussian = model.reconstruction_gaussian(states[-1], **cond)
    x0 = model.decoder.sample(gaussian, generators)
    log_ratio = -log_p - model.decoder.log_prob(x0, gaussian)
    before = x0
    for n, state in enumerate(reversed(states), start=1):
        log_ratio = log_ratio + model.encoder_step(n, before, x0).log_prob(state)
        before = state
    return WeightedPaths(x0, log_ratio)


def effective_sample_size(log_weights: Tensor) -> float:
    r""":math:`(\sum w)^2 / \sum w^2` of log weights ``[n]`` (Kong 1992): 1..n.

    Raises:
        InputError: a weight that is not a number, or none above 0.
    """
    return float(torch.exp(2 * _log_sum(log_weights) - _log_sum(2 * log_weights)))


def log_mean_weight(log_weights: Tensor) -> tuple[float, float]:
    """log of the mean weight, that is log Z, of log weights ``[n]``, and its standard error to first order."""
    n = len(log_weights)
    mean = float(_log_sum(log_weights)) - torch.tensor(float(n), dtype=torch.float64).log().item()
    relative = torch.exp(log_weights.double() - mean)
    return mean, float(relative.std() / n**0.5)


def _log_sum(log_weights: Tensor) -> Tensor:
    total = torch.logsumexp(log_weights.double(), 0)
    if not bool(total.isfinite()):
        raise InputError("the log weights hold NaN or infinity: look at the target's log density")
    return total
