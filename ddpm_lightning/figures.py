"""Pictures: tensors in, images out. Nothing here decides when or where one is shown."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from ddpm_lightning.ops import Generators
from ddpm_lightning.process import ForwardProcess
from ddpm_lightning.schedules import Schedule

__all__ = ["drawn", "forward_strip", "nearest_neighbours", "save_gif", "save_png", "schedule_curves", "tile"]


def tile(images: Tensor, levels: int, columns: int | None = None) -> Tensor:
    """Images side by side.

    Args:
        images: uint8 ``[n, C, H, W]``, grey levels.
        levels: number of grey levels; the highest is shown white.
        columns: images in a row; None for as square a picture as can be.

    Returns:
        uint8 ``[3, height, width]``, 0..255, small images enlarged by a whole factor.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scaled = (images.cpu().double() * (255 / (levels - 1))).round().to(torch.uint8)
    factor = max(1, 32 // images.shape[-1])
    enlarged = scaled.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(enlarged, nrow=columns, padding=2, pad_value=64)


def nearest_neighbours(samples: Tensor, nearest: Tensor, levels: int) -> Tensor:
    """Each sample above the training images nearest to it: a copy shows as an image twice in a column.

    Args:
        samples: uint8 ``[n, C, H, W]``, grey levels; a column each.
        nearest: uint8 ``[n, k, C, H, W]``, one below the other.
        levels: number of grey levels.

    Returns:
        uint8 ``[3, height, width]``, the samples set off from the rest by a white line.
    """
    top = tile(samples, levels, columns=len(samples))
    below = tile(nearest.transpose(0, 1).flatten(0, 1), levels, columns=len(samples))
    line = torch.full((3, 2, top.shape[2]), 255, dtype=torch.uint8)
    return torch.cat([top, line, below], 1)


def forward_strip(forward_process: ForwardProcess, x0: Tensor, times: Tensor, generators: Generators = None) -> Tensor:
    """Images losing their signal along one path of the forward process each.

    Args:
        forward_process: q.
        x0: ``[n, C, H, W]`` in model range; a row each.
        times: ``[K]`` increasing in (0, 1]; a column each, after the clean image.
        generators: source of the noise.

    Returns:
        uint8 ``[3, height, width]``; model range is shown from black to white and clipped outside.
    """
    states = [x0, *forward_process.path(x0, times, generators)]
    rows = torch.stack(states, 1).flatten(0, 1)
    shown = ((rows.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return tile(shown, 256, columns=len(states))


def schedule_curves(schedules: Mapping[str, Schedule], points: int = 201) -> Tensor:
    """gamma and its slope against the time, a curve for each schedule.

    Args:
        schedules: by the name that the legend gives.
        points: number of times, from the first state's to 1.

    Returns:
        uint8 ``[3, height, width]``.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, schedule in schedules.items():
        device = next((p.device for p in schedule.parameters()), torch.device("cpu"))
        with torch.no_grad():
            t = torch.linspace(float(schedule.grid()[1]), 1, points, dtype=torch.float64, device=device)
            left.plot(t.cpu(), schedule.gamma(t).cpu(), label=name)
            right.plot(t.cpu(), schedule.gamma_slope(t).cpu(), label=name)
    left.set(xlabel="t", ylabel="gamma = -log SNR")
    right.set(xlabel="t", ylabel="d gamma / dt", ylim=(0, None))
    left.legend(frameon=False)
    return drawn(figure)


def drawn(figure: Figure) -> Tensor:
    """A matplotlib figure as a picture, uint8 ``[3, height, width]``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)


def save_png(picture: Tensor, path: Path) -> None:
    """Write a uint8 ``[3, height, width]`` picture; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())).save(path)


def save_gif(pictures: Sequence[Tensor], path: Path, seconds: float = 0.1, hold: float = 2.0) -> None:
    """Write uint8 ``[3, height, width]`` pictures as an animation that repeats; folders are made.

    Grey pictures keep their grey levels, of colours a GIF has 256.

    Args:
        pictures: the frames.
        path: the file.
        seconds: how long a frame is shown.
        hold: how long the last one is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())) for picture in pictures]
    if all(bool((picture == picture[:1]).all()) for picture in pictures):
        frames = [frame.convert("L") for frame in frames]
    # in milliseconds
    shown = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * hold)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=shown, loop=0)
