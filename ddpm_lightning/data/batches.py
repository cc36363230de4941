"""Batches of images that lie in memory: a training order that resumes exactly, and evaluation without padding.

Neither class is a torch DataLoader. Indexing a uint8 tensor with a tensor of rows is about 40 times as fast as a
DataLoader that fetches image by image (1.1 million against 28 thousand 28x28 images a second on one core), and the
Trainer takes any iterable with a length.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = ["Batch", "EvalBatches", "IndexBatches", "Split", "TrainBatches"]


class Batch(NamedTuple):
    """What the model's steps receive."""

    image: Tensor
    """uint8 ``[B, C, H, W]``, grey levels; or float32 ``[B, C, *space]``, fields in their own units."""
    label: Tensor
    """int64 ``[B]``."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which a batch has no use for
    """int64 ``[B]``, the row of each image in its split: the same image has the same index on every machine."""
    cond: Mapping[str, Tensor] = {}
    """Other conditions by name: ``vector`` float32 ``[B, K]``, ``field`` float32 ``[B, C', *space]``."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with each of its tensors changed."""
        cond = {name: change(value) for name, value in self.cond.items()}
        return Batch(change(self.image), change(self.label), change(self.index), cond)


@dataclass(frozen=True, eq=False)
class Split:
    """One of train, val and test, whole and in memory on one device."""

    images: Tensor  # uint8 [N, C, H, W], or float32 [N, C, *space], which may lie in a file (stored.py)
    labels: Tensor  # int64 [N]
    pinned: bool = False  # batches lie in page-locked memory, from where they go to a GPU while it computes
    cond: Mapping[str, Tensor] = field(default_factory=dict)  # other conditions by name, [N, ...]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor) -> Batch:
        """A copy of the given rows (int64 ``[B]``), so that nothing done to a batch reaches the split."""
        rows = rows.to(self.images.device, non_blocking=True)
        cond = {name: values[rows] for name, values in self.cond.items()}
        batch = Batch(self.images[rows], self.labels[rows], rows, cond)
        return batch.map(Tensor.pin_memory) if self.pinned else batch

    @property
    def in_memory(self) -> bool:
        """False where rows are read from a file when they are asked for."""
        return all(isinstance(values, Tensor) for values in (self.images, self.labels, *self.cond.values()))

    @property
    def nbytes(self) -> int:
        """Of all that it holds."""
        return self.images.nbytes + self.labels.nbytes + sum(values.nbytes for values in self.cond.values())

    def to(self, device: torch.device) -> "Split":
        cond = {name: values.to(device) for name, values in self.cond.items()}
        return Split(self.images.to(device), self.labels.to(device), cond=cond)

    def chosen(self, count: int, seed: int) -> Batch:
        """A random choice of the images, all of them where there are fewer than ``count``."""
        return self.batch(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count])


class TrainBatches:
    """Endless shuffled batches whose order is a pure function of (seed, number of batches done).

    Batch b belongs to epoch e = b // len(self), which has its own permutation of the images; the last n mod batch_size
    images of a permutation are dropped. No state has to be saved: a resumed run knows how many batches it has done and
    goes on with the next one, in the middle of an epoch too.

    Args:
        split: the training images.
        batch_size: images per batch, over all processes together: a multiple of ``world``, at most ``len(split)``.
        seed: a whole number >= 0; another seed is another order.
        position: the number of batches done, asked for whenever an iteration starts.
        rank: this process, 0..world-1; it gets its contiguous share of each batch.
        world: number of processes. The batches together do not depend on it.
    """

    def __init__(
        self, split: Split, batch_size: int, seed: int, position: Callable[[], int], rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % world:
            raise InputError(
                f"--data.batch_size={batch_size} counts the images of all processes together and cannot be shared"
                f" equally by {world} processes: choose a multiple of {world}"
            )
        if batch_size > len(split):
            raise InputError(
                f"--data.batch_size={batch_size} is larger than the training split: choose at most {len(split)}"
            )
        self.split, self.batch_size, self.seed, self.position = split, batch_size, seed, position
        share = batch_size // world
        self._share = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.split) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        epoch, step = divmod(self.position(), len(self))
        while True:
            # drawn on the CPU, so that a seed means the same order on any device, and moved once an epoch
            order = self._permutation(epoch).to(self.split.images.device)
            for rows in order.split(self.batch_size)[step : len(self)]:
                yield self.split.batch(rows[self._share])
            epoch, step = epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Empty: there is nothing to save. Without this pair of methods Lightning would warn of an inexact resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """See ``state_dict``."""

    def _permutation(self, epoch: int) -> Tensor:
        # Hashed, because torch's CPU generator keeps only the low 32 bits of its seed: with seed * constant + epoch
        # different seeds could share epochs. As spawn_key, because plain (seed, epoch) runs big seeds into the epoch.
        key = int(np.random.SeedSequence(self.seed, spawn_key=(epoch,)).generate_state(1)[0])
        return torch.randperm(len(self.split), generator=torch.Generator().manual_seed(key))


class IndexBatches:
    """The indices 0..n-1, each once over all processes; the last batch is shorter rather than padded.

    Rank r of w gets r, r + w, r + 2w, ... in batches of ``batch_size``. The numbers per rank may differ by one, so a
    mean over ranks is not the mean over indices: sum and count instead.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self._indices = range(rank, n, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._indices) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._indices), self.batch_size):
            yield torch.tensor(self._indices[start : start + self.batch_size])


class EvalBatches:
    """The first ``limit`` images of a split (None: all), shared out among the processes by ``IndexBatches``."""

    def __init__(self, split: Split, batch_size: int, rank: int = 0, world: int = 1, limit: int | None = None) -> None:
        n = len(split) if limit is None else min(limit, len(split))
        self.split, self.batch_size = split, batch_size
        self._rows = IndexBatches(n, batch_size, rank, world)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.split.batch, self._rows)
