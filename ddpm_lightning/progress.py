"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = ["progress", "tracked"]

T = TypeVar("T")
QUIET = 20
"""Seconds between two lines, and before the first, where there is no terminal."""


class _Bar(tqdm):
    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        return tqdm.status_printer(file) if file.isatty() else lambda line: print(line, file=file, flush=True)


def progress(what: str, total: int, unit: str = "images", shown: bool = True) -> "tqdm[Any]":
    """What is told how much is done (``update``), and shows it on standard error.

    Where there is no terminal, nothing is said of work that takes less than ``QUIET`` seconds.

    Args:
        what: names the work.
        total: number of units in all.
        unit: what is counted.
        shown: False shows nothing, for all processes but one.
    """
    pace = {"mininterval": 0.1, "leave": False} if sys.stderr.isatty() else {"mininterval": QUIET, "delay": QUIET}
    return _Bar(desc=what, total=total, unit=f" {unit}", disable=not shown, **pace)


def tracked(
    batches: Iterable[T], total: int, what: str, unit: str = "images", count: Callable[[Any], int] = lambda b: len(b[0])
) -> Iterator[T]:
    """The batches, with their progress; ``count`` says how many of the ``total`` units are in a batch."""
    with progress(what, total, unit) as bar:
        for batch in batches:
            yield batch
            bar.update(count(batch))
