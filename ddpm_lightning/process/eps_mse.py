from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.ops import Generators, sum_per_image
from ddpm_lightning.process.model import DiffusionModel

__all__ = ["eps_mse_table", "spread_times"]


def spread_times(model: DiffusionModel, points: int) -> Tensor:
    """At most ``points`` (2 or more) times of the chain, both ends included, nearly equally spaced in gamma.

    The network was trained at these times. Where the chain has too few noise levels in a region of gamma, there are
    fewer times. Float64 ``[K]``, increasing.
    """
    at_least(2, "both ends of the chain", points=points)
    times = model.grid[1:]
    gammas = model.schedule.mean_gamma(times)
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
    r""":math:`E|\epsilon - \hat\epsilon(x_t)|^2 / D` at each time, for the denoiser that the reverse process uses
    (clipped or not).

    One noise for each image and time, so K evaluations of the network for each image. ``batches`` are pairs of x0 and
    cond, at least one, and ``times`` ``[K]`` increase. Returns gammas and eps_mse, the arguments of AnalyticVariance.
    """
    if not model.has_plain_process:
        raise InputError(
            "the denoiser's error gives an analytic variance only with a fixed encoder and one noise level for all "
            "pixels, and this model learns more: it keeps its own variance"
        )
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
