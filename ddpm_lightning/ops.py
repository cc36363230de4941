"""Tensor helpers that every layer above uses: broadcasting, sums per image, and random draws.

Shape rule of the whole package: a quantity that belongs to an image and a time (alpha_t, log_var, t, ...) has shape
``[B]`` and is expanded with :func:`expand_to` to ``[B, 1, ...]`` before it meets images ``[B, C, *space]``. Nothing
relies on trailing-dimension broadcasting, so B == W is not a special case.

``*space`` stands for the axes of space: H, W for images, and L or D, H, W for fields of one or three dimensions. What
is said of images and pixels holds for fields and their values, too.

These arguments mean the same in all modules, and docstrings do not explain them again::

    model         the generative model, a process.DiffusionModel
    x0            images [B, C, *space] in model range [-1, 1]
    x_t, x_s, x1  states of the forward process at times s < t, and its first state, [B, C, *space]
    t, s          times [B], or [] for one time of the whole batch
    generators    source of all random draws, see Generators
    cond          conditions by name (label, ...), passed on to the network
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = [
    "BatchGenerator",
    "DeviceTable",
    "Generators",
    "as_times",
    "expand_mask",
    "expand_to",
    "image_generators",
    "log1mexp",
    "rand",
    "randn_like",
    "shuffled_places",
    "sum_per_image",
    "sum_per_image_of",
]


class DeviceTable:
    """A tensor that is copied to each device once. A copy in each step would make the host wait for the device.

    It is no buffer: ``module.half()`` and precision plugins cast buffers, and a float64 table must stay float64."""

    def __init__(self, table: Tensor) -> None:
        self._copies = {table.device: table}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._copies:
            self._copies[device] = next(iter(self._copies.values())).to(device)
        return self._copies[device]


@dataclass(frozen=True)
class BatchGenerator:
    """The generators of one batch in training, whose images are spread over processes in equal, consecutive parts.

    Each process draws for the whole batch and takes what belongs to its part. So the draws of an image do not depend on
    the number of processes. Each process holds the noise of the whole batch for a moment.
    """

    generator: torch.Generator  # in the same state on all processes; another state for another batch
    part: int = 0  # this process' part
    parts: int = 1
    step_generator: torch.Generator | None = None  # one state for all batches of an optimiser step; None: generator
    batch: int = 0  # the place of this batch among those that the step accumulates
    batches: int = 1

    def own(self, draws: Tensor) -> Tensor:
        """This part of what was drawn for all, ``[parts * B, ...]`` -> ``[B, ...]``."""
        return draws.chunk(self.parts)[self.part]


Generators = torch.Generator | BatchGenerator | Sequence[torch.Generator] | None
"""One generator for the batch, a BatchGenerator, one generator for each image, or None for torch's global generator.

With one generator for each image, the draws of an image do not depend on the other images of the batch. Exceptions are
StratifiedTimes and EquispacedTimes, which divide the time axis among the images of a batch."""


def expand_to(values: Tensor, like: Tensor) -> Tensor:
    """Append dimensions of size 1 until there are as many as ``like`` has: ``[B]`` -> ``[B, 1, ...]``, ``[]`` too."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def expand_mask(mask: Tensor, like: Tensor) -> Tensor:
    """A mask for images ``like`` ``[B, C, *space]``, on their device and broadcastable to them.

    ``mask`` is bool, ``[C, *space]`` for all images or ``[B, C, *space]``. Any dimension may be 1.
    """
    full = (1,) * (like.ndim - mask.ndim) + mask.shape
    fits = like.ndim - mask.ndim in (0, 1) and all(m in (1, n) for m, n in zip(full, like.shape, strict=True))
    if mask.dtype != torch.bool or not fits:
        raise InputError(
            f"mask of shape {list(mask.shape)} and {mask.dtype} for images {list(like.shape)}: give torch.bool of "
            f"shape {list(like.shape[1:])} for all images, or {list(like.shape)}; a dimension may be 1"
        )
    return mask.to(like.device).reshape(full)


def as_times(t: Tensor | float, like: Tensor) -> Tensor:
    """Times as float64 on the device of ``like``, either ``[]`` (one for the batch) or ``[B]`` (one for each image)."""
    times = torch.as_tensor(t, dtype=torch.float64, device=like.device)
    if times.ndim > 1 or (times.ndim == 1 and times.shape[0] != like.shape[0]):
        raise ValueError(f"expected one time for each of {like.shape[0]} images, got shape {tuple(times.shape)}")
    return times


def sum_per_image(values: Tensor) -> Tensor:
    """Sum over all dimensions but the first, in float64: ``[B, ...]`` -> ``[B]``."""
    return values.flatten(1).sum(1, dtype=torch.float64)


def sum_per_image_of(values: Tensor, like: Tensor) -> Tensor:
    """Sum over all dimensions but the first of ``values`` broadcast to the shape of ``like``, ``[B]``, float64."""
    values = values.double()
    repeats = like[0].numel() // max(values[0].numel(), 1)
    return (values.flatten(1).sum(1) * repeats).expand(like.shape[0])


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(-x))`` for x > 0 without cancellation at either end (Maechler 2012)."""
    return torch.where(x < 0.6931471805599453, torch.log(-torch.expm1(-x)), torch.log1p(-torch.exp(-x)))


def image_generators(seed: int, indices: Sequence[int] | Tensor) -> list[torch.Generator]:
    """A CPU generator for each image. It depends on (seed, index of the image) only, so not on the device either."""
    # one transfer from the device, not one for each index
    numbers = indices.tolist() if isinstance(indices, Tensor) else indices
    # torch's CPU generator keeps the low 32 bits of a seed: the prime keeps images of different seeds apart
    return [torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**32) for index in numbers]


def randn_like(x: Tensor, generators: Generators) -> Tensor:
    """Standard normal noise ``[B, ...]`` of the shape, dtype and device of ``x``."""
    return _draw(torch.randn, x.shape, x.dtype, x.device, generators)


def rand(like: Tensor, generators: Generators) -> Tensor:
    """Numbers ``[B]`` uniform in [0, 1), float64, on the device of ``like`` (B = ``like.shape[0]``)."""
    return _draw(torch.rand, like.shape[:1], torch.float64, like.device, generators)


def shuffled_places(like: Tensor, generators: Generators) -> tuple[Tensor, int]:
    """The place of each image in a shuffled order of its batch, float64 ``[B]``, and the size of that batch: B, or of
    all parts together under a :class:`BatchGenerator`."""
    if isinstance(generators, BatchGenerator):
        whole = like.new_empty(()).expand(generators.parts * like.shape[0])
        places, count = shuffled_places(whole, generators.generator)
        return generators.own(places), count
    return torch.argsort(rand(like, generators)).double(), like.shape[0]


def _draw(
    kind: Callable[..., Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device, generators: Generators
) -> Tensor:
    """A draw of ``torch.rand`` or ``torch.randn``. The first dimension of ``shape`` counts images."""
    if isinstance(generators, BatchGenerator):
        whole = torch.Size((generators.parts * shape[0], *shape[1:]))
        return generators.own(_draw(kind, whole, dtype, device, generators.generator))
    if isinstance(generators, Sequence):
        if len(generators) != shape[0]:
            raise InputError(f"{len(generators)} generators for a batch of {shape[0]} images: give one for each image")
        draws = torch.empty(shape, dtype=dtype)
        for row, generator in zip(draws, generators, strict=True):
            kind(row.shape, generator=generator, dtype=dtype, out=row)
        return draws.to(device)
    source = device if generators is None else generators.device
    return kind(shape, generator=generators, dtype=dtype, device=source).to(device)
