"""Measuring the denoiser's error as a function of the noise level: the table that AnalyticVariance needs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.ops import Generators, sum_per_image
from ddpm_lightning.process.model import DiffusionModel

__all__ = ["eps_mse_table", "spread_times"]


def spread_times(model: DiffusionModel, points: int) -> Tensor:
    """At most ``points`` of the chain's own times, both ends included, nearly equally spaced in gamma.

    Being the chain's own, they show the network no noise level that it was not trained at; where the chain has fewer
    noise levels than a region of gamma asks for, there are fewer times.

    Returns:
        float64 ``[K]``, increasing.

    Raises:
        InputError: ``points`` < 2.
    """
    at_least(2, "both ends of the chain", points=points)
    times = model.grid[1:]
    gammas = model.schedule.gamma(times)
    ends = gammas[0].item(), gammas[-1].item()
    wanted = torch.linspace(*ends, points, dtype=torch.float64, device=gammas.device)
    return times[(gammas[None, :] - wanted[:, None]).abs().argmin(1).unique()]


@torch.no_grad()
def eps_mse_table(
    model: DiffusionModel,
    batches: Iterable[tuple[Tensor, Mapping[str, Any]]],
    times: Tensor,
    generators: Generators = None,
) -> tuple[list[float], list[float]]:
    """E|eps - eps-hat(x_t)|^2 / D at each time, for the denoiser that the reverse process uses (clipped or not).

    One noise for each image and time, so K network evaluations an image.

    Args:
        model: the generative model, in evaluation mode.
        batches: images ``[B, C, H, W]`` in model range, and the conditions that the network is given with them.
        times: ``[K]``, increasing.
        generators: source of the noise.

    Returns:
        gammas and eps_mse, K numbers each: the arguments of AnalyticVariance.

    Raises:
        InputError: no images.
    """
    sums, count = torch.zeros(len(times), dtype=torch.float64), 0
    for x0, cond in batches:
        for k, t in enumerate(times.to(x0.device)):
            x_t, eps = model.forward_process.noised(x0, t, generators)
            prediction = model.reverse_process.denoiser(x_t, t, **cond)
            sums[k] += sum_per_image((prediction.eps - eps).square()).sum().cpu()
        count += x0.numel()
    if count == 0:
        raise InputError("no images to measure the denoiser's error on")
    return model.schedule.gamma(times).tolist(), (sums / count).tolist()
