"""The optimal fixed variance of a trained model's reverse steps, measured on training images."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.data import ImageDataModule, levels_to_model
from ddpm_lightning.errors import InputError
from ddpm_lightning.evaluation.progress import tracked
from ddpm_lightning.process import eps_mse_table, spread_times
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["measure_variance"]


def measure_variance(
    module: DiffusionModule,
    data: ImageDataModule,
    images: int = 2000,
    points: int = 40,
    seed: int = 0,
    batch_size: int = 100,
) -> tuple[str, dict[str, Any]]:
    """The mean squared error of the averaged model's eps at noise levels spread over the chain.

    Args:
        module: the trained module; its network does not give the variance itself.
        data: its images.
        images: number of training images, at most all.
        points: noise levels, 2 or more, at most.
        seed: seed of the choice of images and of the noise.
        batch_size: images evaluated at a time.

    Returns:
        The table, and the configuration of a model with the ``AnalyticVariance`` of it.

    Raises:
        InputError: a model with a learned variance, too few points.
    """
    model = module.ema_model
    if model.reverse_process.variance.network_outputs > 1:
        raise InputError(
            f"the variance of this run is {type(model.reverse_process.variance).__name__}, which its network gives: "
            "there is nothing to measure"
        )
    times, generator = spread_times(model, points), torch.Generator().manual_seed(seed)
    split = data.split("train")
    rows = torch.randperm(len(split), generator=generator)[:images]

    def batches() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for part in rows.split(batch_size):
            batch = split.batch(part)
            condition = {"label": batch.label.to(module.device)} if module.class_conditional else {}
            yield levels_to_model(batch.image.to(module.device), module.levels), condition

    gammas, eps_mse = eps_mse_table(model, tracked(batches(), len(rows), "training images"), times, generator)
    lines = [f"{'gamma':>9} {'mean squared error of eps':>26}"]
    lines += [f"{gamma:>9.3f} {error:>26.6g}" for gamma, error in zip(gammas, eps_mse, strict=True)]
    variance = {
        "class_path": "ddpm_lightning.process.AnalyticVariance",
        "init_args": {"gammas": gammas, "eps_mse": eps_mse},
    }
    return "\n".join(lines), {"model": {"variance": variance}}
