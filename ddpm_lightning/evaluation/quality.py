"""Samples of a trained module beside real images: drawing, measuring and tabulating, for callbacks and scripts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ddpm_lightning.data import Batch, levels_to_model
from ddpm_lightning.data.batches import EvalBatches, IndexBatches, Split
from ddpm_lightning.metrics import FrechetDistance, QualityMetrics
from ddpm_lightning.samplers import Sampler
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["Labelled", "add_images", "image_batches", "quality_table", "sample_batches"]

Labelled = tuple[Tensor, Tensor | None]
"""Grey levels uint8 ``[B, C, H, W]`` and the classes ``[B]`` that they have or are meant to have, or None."""


def sample_batches(
    module: DiffusionModule,
    sampler: Sampler,
    n: int,
    batch_size: int,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float = 1.0,
    rank: int = 0,
    world: int = 1,
    precision: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Labelled]:
    """This process's share of images 0..n-1 of a seed, the same images on any number of processes.

    Args:
        module: the trained module, whose averaged model is sampled; its classes in turn, if it has any.
        sampler: how to sample.
        n: number of images of all processes together.
        batch_size: images drawn at a time on each process.
        seed: seed of the images.
        steps: steps of the sampler, cut to the T of a chain that has fewer; None for all T.
        guidance_scale: of classifier-free guidance; 1 is none.
        rank: this process, 0..world-1.
        world: number of processes.
        precision: context that the network is evaluated in.
    """
    request = SampleRequest(sampler, steps, seed=seed, guidance_scale=guidance_scale, cap_steps=True)
    drawing = request.on(module)
    for indices in IndexBatches(n, batch_size, rank, world):
        with torch.inference_mode(), precision():
            images = drawing(indices)
        yield images, drawing.label(indices)


def image_batches(images: Batch, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Labelled]:
    """This process's share of real images, with their classes."""
    for batch in EvalBatches(Split(images.image, images.label), batch_size, rank, world):
        yield batch.image, batch.label


@torch.inference_mode()
def add_images(
    metric: QualityMetrics | FrechetDistance, batches: Iterable[Labelled], real: bool, module: DiffusionModule
) -> None:
    """Give a metric, which is on the module's device, one side of the comparison."""
    for levels, label in batches:
        x = levels_to_model(levels.to(module.device), module.levels)
        if isinstance(metric, FrechetDistance):
            metric.update(x, real)
        else:
            metric.update(x, real, None if label is None else label.to(module.device))


def quality_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each set of images that was measured, a column for each figure; ``-`` where a set lacks one."""
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    first = max(map(len, rows))
    lines = [f"{'':<{first}}" + "".join(f" {name:>13}" for name in names)]
    for row, figures in rows.items():
        cells = (f"{figures[name]:.4f}" if name in figures else "-" for name in names)
        lines.append(f"{row:<{first}}" + "".join(f" {cell:>13}" for cell in cells))
    return "\n".join(lines)
