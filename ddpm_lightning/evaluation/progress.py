"""How far a long measurement is: a bar on a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = ["tracked"]

T = TypeVar("T")


def _images(batch: Any) -> int:
    return len(batch[0])


def tracked(
    batches: Iterable[T], total: int, what: str, unit: str = "images", count: Callable[[T], int] = _images
) -> Iterator[T]:
    """The batches, with their progress on standard error.

    Args:
        batches: what the work is done on, one after the other.
        total: how many units there are in all batches.
        what: names the work.
        unit: what is counted.
        count: units of a batch; of its own the length of its first part.
    """
    terminal = sys.stderr.isatty()
    with tqdm(desc=what, total=total, unit=f" {unit}", mininterval=0.1 if terminal else 20, leave=not terminal) as bar:
        for batch in batches:
            yield batch
            bar.update(count(batch))
