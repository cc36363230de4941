"""Pictures: tensors in, images out. Nothing here decides when or where one is shown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from ddpm_lightning.lattice import Spectrum
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import ForwardProcess
from ddpm_lightning.schedules import Schedule

__all__ = [
    "CostCurve", "cost_curves", "drawn", "fields_in_grey", "forward_strip", "nearest_neighbours", "observable_curves",
    "save_gif", "save_png", "schedule_curves", "tile",
]  # fmt: skip


def tile(images: Tensor, levels: int | None, columns: int | None = None) -> Tensor:
    """Images uint8 ``[n, C, H, W]`` of that many grey levels side by side: a picture, uint8 ``[3, height, width]``.

    The highest level is white. Small images are enlarged by a whole factor. ``columns`` is the number of images in a
    row; None makes the picture as square as possible. One channel is grey and three are red, green and blue; any other
    number is shown as so many grey pictures, the channels of an image side by side. With ``levels`` None they are
    fields of real numbers ``[n, C, *space]``, shown by :func:`fields_in_grey`.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    if levels is None:
        images, levels = fields_in_grey(images), 256
        images = images.transpose(1, 2).flatten(2)[:, None]
    scaled = (images.cpu().double() * (255 / (levels - 1))).round().to(torch.uint8)
    if images.shape[1] not in (1, 3):
        scaled = scaled.transpose(1, 2).flatten(2)[:, None]
    factor = max(1, 32 // images.shape[-1])
    enlarged = scaled.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(enlarged, nrow=columns, padding=2, pad_value=64)


def fields_in_grey(fields: Tensor, height: int = 32) -> Tensor:
    """Fields of real numbers ``[n, C, *space]`` as pictures of 256 grey levels, uint8 ``[n, C, H, W]``.

    All on one scale, from the 0.5 % quantile of all values (black) to that of 99.5 % (white). Of one dimension the
    graph is drawn, ``height`` pixels high; of three the slice in the middle of the first one.
    """
    values = fields.cpu().double()
    if values.ndim == 5:
        values = values[:, :, values.shape[2] // 2]
    some = values.flatten()[:: max(1, values.numel() // 100_000)]
    low, high = torch.quantile(some, torch.tensor([0.005, 0.995], dtype=torch.float64))
    unit = ((values - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    if values.ndim == 3:
        row = ((1 - unit) * (height - 1)).round().long()
        # the pixels between a value and the next are filled, so that the graph is one line
        after = torch.cat([row[..., 1:], row[..., -1:]], -1)
        y = torch.arange(height)[:, None]
        low_row, high_row = torch.minimum(row, after)[..., None, :], torch.maximum(row, after)[..., None, :]
        return ((y >= low_row) & (y <= high_row)).to(torch.uint8) * 255
    return (unit * 255).round().to(torch.uint8)


def nearest_neighbours(samples: Tensor, nearest: Tensor, levels: int) -> Tensor:
    """Samples uint8 ``[n, C, H, W]``, a column each, and below a white line the ``nearest`` training images of each,
    uint8 ``[n, k, C, H, W]``. A sample that is a copy shows twice in its column.
    """
    top = tile(samples, levels, columns=len(samples))
    below = tile(nearest.transpose(0, 1).flatten(0, 1), levels, columns=len(samples))
    line = torch.full((3, 2, top.shape[2]), 255, dtype=torch.uint8)
    return torch.cat([top, line, below], 1)


def forward_strip(
    forward_process: ForwardProcess, x0: Tensor, times: Tensor, generators: Generators = None, grey: bool = True
) -> Tensor:
    """Images that lose their signal, each along one path of the forward process: a row for each image, a column for the
    clean image and for each of the increasing ``times`` ``[K]`` in (0, 1]. Model range goes from black to white, or
    where the data are not ``grey``, all values are on one scale. Below each column are its time t and its log SNR in
    nats.
    """
    states = [x0, *forward_process.path(x0, times, generators)]
    rows = torch.stack(states, 1).flatten(0, 1)
    shown = ((rows.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8) if grey else rows
    log_snr = -forward_process.schedule.mean_gamma(times)
    names = [f"{t:.2f}" for t in times.tolist()], [f"{value:.1f}" for value in log_snr.tolist()]
    return _labelled(
        tile(shown, 256 if grey else None, columns=len(states)), {"t": ["0", *names[0]], "log SNR": ["", *names[1]]}
    )


def _labelled(picture: Tensor, rows: Mapping[str, Sequence[str]]) -> Tensor:
    """Rows of text below a picture of equal columns, a text for each column, and the row's name on the left."""
    _, height, width = picture.shape
    count = len(next(iter(rows.values())))
    column = (width - 2) / count  # the frame of ``tile`` on the left is 2 wide
    longest = max(len(text) for texts in rows.values() for text in texts)
    font = ImageFont.load_default(size=min(24, max(8, 1.6 * column / longest)))
    line = math.ceil(1.4 * font.size)  # type: ignore[union-attr]  # Pillow has FreeType
    margin = math.ceil(max(font.getlength(name) for name in rows)) + 8
    canvas = Image.new("RGB", (margin + width, height + line * len(rows) + 4), "white")
    canvas.paste(Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())), (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for number, (name, texts) in enumerate(rows.items()):
        y = height + 2 + line * number
        draw.text((margin - 4, y), name, "black", font, anchor="ra")
        for k, text in enumerate(texts):
            draw.text((margin + 1 + column * (k + 0.5), y), text, "black", font, anchor="ma")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


@dataclass(frozen=True)
class CostCurve:
    """What each of K steps costs on average.

    Attributes:
        edges: times ``[K + 1]``, increasing: step k lies between two of them.
        costs: ``[K]``, bits/dim; NaN for a step that no image took.
    """

    edges: Tensor
    costs: Tensor


def cost_curves(curves: Mapping[str, CostCurve], bins: int = 40) -> Tensor:
    """Which steps of a chain carry the bits, a curve for each form of the bound by its name: the cost of the steps for
    each unit of t, whose area is the whole cost, and beside it the cost of all steps up to t. Neighbouring steps are
    drawn as one where there are more than ``bins``.
    """
    figure, left, right = _two_axes()
    for name, curve in curves.items():
        picks = torch.linspace(0, len(curve.costs), min(bins, len(curve.costs)) + 1).round().long()
        parts = curve.costs.tensor_split(picks[1:-1])
        costs = torch.stack([part.nanmean() * len(part) for part in parts])
        edges = curve.edges[picks]
        left.stairs((costs / edges.diff()).numpy(), edges.numpy(), label=name, baseline=None)
        right.plot(edges.numpy(), np.append(0, np.nancumsum(costs.numpy())), label=name)
    left.set(xlabel="t", ylabel="bits/dim for each unit of t", yscale="symlog")
    right.set(xlabel="t", ylabel="bits/dim of the steps up to t", ylim=(0, None))
    left.legend(frameon=False)
    return drawn(figure)


def schedule_curves(schedules: Mapping[str, Schedule], points: int = 201) -> Tensor:
    """gamma and its slope at ``points`` times from the first state to 1, a curve for each schedule by its name.

    Where pixels have a gamma of their own it is their mean, in a band from the smallest to the largest.
    """
    figure, left, right = _two_axes()
    for name, schedule in schedules.items():
        device = next((p.device for p in schedule.parameters()), torch.device("cpu"))
        with torch.no_grad():
            t = torch.linspace(float(schedule.grid()[1]), 1, points, dtype=torch.float64, device=device)
            for axes, values in ((left, schedule.gamma(t)), (right, schedule.gamma_slope(t))):
                of_pixels = values.cpu().reshape(points, -1)
                axes.plot(t.cpu(), of_pixels.mean(1), label=name)
                if schedule.pixel_shape is not None:
                    axes.fill_between(t.cpu(), of_pixels.amin(1), of_pixels.amax(1), alpha=0.2)
    left.set(xlabel="t", ylabel="gamma = -log SNR")
    right.set(xlabel="t", ylabel="d gamma / dt", ylim=(0, None))
    left.legend(frameon=False)
    return drawn(figure)


def observable_curves(spectra: Mapping[str, Spectrum], magnetisation: Mapping[str, Tensor]) -> Tensor:
    """Power spectra with their standard errors, and distributions of a magnetisation ``[n]``, of several sets of
    configurations by name."""
    figure, left, right = _two_axes()
    for name, spectrum in spectra.items():
        k2, mean, se = (values.cpu().numpy() for values in (spectrum.k2, spectrum.mean, spectrum.se))
        left.errorbar(k2, mean, se, fmt=".-", markersize=3, linewidth=0.8, label=name)
    ends = torch.cat([values.cpu() for values in magnetisation.values()])
    edges = torch.linspace(float(ends.min()), float(ends.max()) + 1e-9, 41, dtype=torch.float64)
    for name, values in magnetisation.items():
        counts, _ = torch.histogram(values.cpu().double(), edges, density=True)
        right.stairs(counts.numpy(), edges.numpy(), label=name)
    left.set(xlabel="squared lattice momentum", ylabel="power of a mode", yscale="log")
    right.set(xlabel="magnetisation of a configuration", ylabel="density", ylim=(0, None))
    left.legend(frameon=False)
    return drawn(figure)


def _two_axes() -> tuple[Figure, Axes, Axes]:
    """A figure and two axes side by side, with room for labels of any width."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    return figure, left, right


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

    A frame is shown for ``seconds``, the last one for ``hold`` seconds. Grey pictures keep their grey levels; of
    colours a GIF has 256.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy())) for picture in pictures]
    if all(bool((picture == picture[:1]).all()) for picture in pictures):
        frames = [frame.convert("L") for frame in frames]
    # in milliseconds
    shown = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * hold)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=shown, loop=0)
