"""How far a sampling is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["SamplingProgress"]


class SamplingProgress:
    """Counts images and their steps on one process, and shows what that makes of all of them.

    Args:
        n: number of images of all processes.
        share: number of images of this process, at least 1.
        steps: steps for each image.
        shown: False shows nothing, for all processes but one.
    """

    interval = 20.0
    """Seconds between two lines where there is no terminal."""

    def __init__(self, n: int, share: int, steps: int, shown: bool = True) -> None:
        self.n, self.share, self.steps = n, share, steps
        self._images, self._moves = 0, 0
        terminal = sys.stdout.isatty()
        self._lines = shown and not terminal
        columns = (TextColumn("sampling"), BarColumn(), TextColumn("{task.fields[done]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, disable=not shown or not terminal, transient=True)
        self._task = self._bar.add_task("", total=share * steps, done=self._done())
        self._start = self._last = time.monotonic()
        self._bar.start()

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.stop()

    def stepped(self, images: int) -> None:
        """That many images have made a step."""
        self._moves += images
        self._bar.update(self._task, completed=self._moves, done=self._done())
        if self._lines and time.monotonic() - self._last >= self.interval:
            self._last = time.monotonic()
            left = (self._last - self._start) * (self.share * self.steps / self._moves - 1)
            print(f"sampling: {self._done()}, about {left:.0f} s left", flush=True)

    def drawn(self, images: int) -> None:
        """That many images are finished."""
        self._images += images
        self._bar.update(self._task, done=self._done())

    def _done(self) -> str:
        # the processes are taken to be equally fast
        images, moves = (round(self.n * count / self.share) for count in (self._images, self._moves))
        return f"{images:,} of {self.n:,} images, {moves:,} of {self.n * self.steps:,} steps"
