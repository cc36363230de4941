"""The optimal fixed variance of a trained model's reverse steps, measured on training images."""

from collections.abc import Iterator
from typing import Any

import torch
import yaml
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.process import eps_mse_table, spread_times
from ddpm_lightning.progress import tracked
from ddpm_lightning.runs import Run

__all__ = ["variance"]


def variance(trained: Trained, images: int = 2000, points: int = 40) -> dict[str, Any]:
    """Measure the optimal fixed variance of the reverse steps, and write it down as a configuration.

    The mean squared error of the averaged model's eps (clipped where the model clips) is measured on training images at
    noise levels spread over the chain, one network evaluation for each image and level, in float32. AnalyticVariance
    turns it into the variance of every step, of any number of steps.

    Writes analytic.yaml, which is laid over the configuration of the run.

    Args:
        trained: the run
        images: training images, at most all
        points: noise levels, 2 or more, at most
    """
    at_least(1, images=images)
    module = trained.diffusion
    model = module.ema_model
    if model.reverse_process.variance.network_outputs > 1:
        raise InputError(
            f"the variance of this run is {type(model.reverse_process.variance).__name__}, which its network gives: "
            "there is nothing to measure"
        )
    times, generator = spread_times(model, points), torch.Generator().manual_seed(trained.seed)
    split = trained.data.split("train")
    rows = torch.randperm(len(split), generator=generator)[:images]

    def batches() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for part in rows.split(trained.batch_size):
            batch = split.batch(part)
            batch = batch.map(lambda column: column.to(module.device))
            yield module.scale.to_model(batch.image), module.condition(batch)

    gammas, eps_mse = eps_mse_table(model, tracked(batches(), len(rows), "training images"), times, generator)
    lines = [f"{'gamma':>9} {'mean squared error of eps':>26}"]
    lines += [f"{gamma:>9.3f} {error:>26.6g}" for gamma, error in zip(gammas, eps_mse, strict=True)]
    arguments = {"gammas": gammas, "eps_mse": eps_mse}
    part = {"class_path": "ddpm_lightning.process.AnalyticVariance", "init_args": arguments}
    overlay = {"model": {"variance": part}}
    path = trained.results("variance").write("analytic.yaml", yaml.safe_dump(overlay, sort_keys=False))
    config = Run(trained.run).config_path
    print("\n".join([*lines, f"use it: ddpm test -c {config} -c {path} --ckpt_path {trained.checkpoint}"]))
    return overlay
