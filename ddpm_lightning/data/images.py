"""A folder of pictures."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only

from ddpm_lightning.data.batches import Split
from ddpm_lightning.data.datamodule import ImageDataModule, SplitName
from ddpm_lightning.data.folders import find_pictures
from ddpm_lightning.data.untrusted import decode, opened_picture, shape_of
from ddpm_lightning.errors import InputError
from ddpm_lightning.progress import progress

__all__ = ["Images"]

T = TypeVar("T")
_THREADS = 8
_CONTROL_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Images(ImageDataModule):
    """Your own pictures, in one folder: ``--data Images --data.path FOLDER``.

    Subfolders are classes, in the order of their names; a folder without any is one class. Pictures may be .png, .jpg,
    .bmp, .gif, .tiff or .webp, of 8 bits a channel, and are turned upright as their EXIF data say. All of a split are
    held in memory: C x H x W bytes each, at most half of what is free. Hidden files are passed over; one line on
    standard error tells how many other files are no pictures.

    Folders ``train``, ``val`` and ``test`` in it are splits, each laid out like this. For ``val`` or ``test`` without
    a folder, pictures are drawn from the training pictures: which ones depends on the files' names and on nothing
    else, so it is the same in every run and on every machine. Where pictures are added, some of the old ones may come
    into another split; give ``test`` a folder to keep it.

    Args:
        path: the folder. It must be given.
        size: height and width, ``[H, W]`` or one number for both. Pictures of another size are resized until they just
            cover it (bicubic, with antialiasing; small ones grow), and what is too much is cut off, the same on both
            sides. None: all pictures must have one size.
        channels: 1 makes all pictures grey (ITU-R 601), 3 makes them RGB. None: they are all grey, or all in colour.
        val_fraction: share of the pictures that is drawn for validation, in (0, 1).
        test_fraction: the same for test.
    """

    levels = 256

    def __init__(
        self,
        path: str = "",
        size: int | list[int] | None = None,
        channels: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self._size = _height_and_width(size)
        if channels not in (None, 1, 3):
            raise InputError(f"--data.channels={channels!r} must be 1 (grey), 3 (RGB) or null (what the pictures have)")
        fractions: dict[SplitName, float] = {"val": val_fraction, "test": test_fraction}
        for name, fraction in fractions.items():
            if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
                raise InputError(f"--data.{name}_fraction={fraction!r} must lie strictly between 0 and 1")
        if not path:
            raise InputError("--data.path is missing: name the folder that holds the pictures")
        self.path, self.size, self.channels = path, size, channels
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._folder = Path(path).expanduser().absolute()
        found = find_pictures(self._folder, fractions)
        self._files, self._skipped = found.files, found.skipped
        self.classes = found.classes
        """Names of the classes, 0 and upwards."""
        self.num_classes = len(found.classes)
        self._first = found.files["train"][0][0]
        self.shape = self._shape()
        super().__init__({name: len(files) for name, files in found.files.items()}, **kwargs)

    def prepare_data(self) -> None:
        """Look at the head of every picture of all splits; InputError for one that cannot be used."""
        if count := sum(self._skipped.values()):
            what = "1 file that is no picture" if count == 1 else f"{count:,} files that are no pictures"
            kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in self._skipped.most_common(5))
            print(f"{self._folder}: skipped {what} ({kinds})", file=sys.stderr, flush=True)

        def look(path: Path) -> None:
            with opened_picture(path) as image:
                self._compare(path, shape_of(image))

        _for_each([path for files in self._files.values() for path, _ in files], look, "checking")

    def load(self, split: SplitName) -> Split:
        files = self._files[split]
        self._check_memory(split)
        images = torch.empty((len(files), *self.shape), dtype=torch.uint8)

        def read(row: int) -> None:
            path = files[row][0]
            with opened_picture(path) as image:
                self._compare(path, shape_of(image))
                images[row] = decode(path, image, self.shape)

        _for_each(range(len(files)), read, f"reading for {split}")
        return Split(images, torch.tensor([label for _, label in files]))

    def _shape(self) -> tuple[int, int, int]:
        """Of the pictures as they will be: what is asked for, or what the first one has."""
        if self.channels and self._size:
            return self.channels, *self._size
        with _large_pictures(), opened_picture(self._first) as image:
            channels, *size = shape_of(image)
        height, width = self._size or size
        return self.channels or channels, height, width

    def _compare(self, path: Path, found: tuple[int, int, int]) -> None:
        """InputError for a picture that is not like the first one."""
        channels, *size = self.shape
        if not self._size and [*found[1:]] != size:
            raise InputError(
                f"pictures differ in size (height x width): {self._first} has {size[0]} x {size[1]} pixels, {path} has "
                f"{found[1]} x {found[2]}; to resize and crop all of them set --data.size, for example "
                f"--data.size={min(*size, *found[1:])}"
            )
        if not self.channels and found[0] != channels:
            grey, colour = (self._first, path) if channels == 1 else (path, self._first)
            raise InputError(
                f"some pictures are grey, as {grey}, and some in colour, as {colour}: to make all of them one kind set "
                "--data.channels=1 or --data.channels=3"
            )

    def _check_memory(self, split: SplitName) -> None:
        count, free = self.sizes[split], _free_memory()
        needed = count * torch.Size(self.shape).numel()
        if free is not None and needed > free / 2:
            raise InputError(
                f"{self._folder}: {count:,} pictures for {split} of {' x '.join(map(str, self.shape))} bytes take "
                f"{needed / 1e9:,.1f} GB, more than half of the {free / 1e9:,.1f} GB of memory that are free: "
                "choose a smaller --data.size, or give fewer pictures"
            )


def _height_and_width(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    both = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(both) != 2 or not all(isinstance(each, int) and not isinstance(each, bool) and each >= 1 for each in both):
        raise InputError(
            f"--data.size={size!r} must be a whole number >= 1, or height and width, for example --data.size=[48,64]"
        )
    return both[0], both[1]


def _large_pictures() -> AbstractContextManager[Any]:
    """Keeps PIL's warnings of large pictures quiet; those that it refuses are told of all the same."""
    return warnings.catch_warnings(action="ignore")


def _for_each(items: Sequence[T], work: Callable[[T], None], what: str) -> None:
    """Do the work for all items, in several threads; the first error ends it."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        # the warnings' filters belong to the process, so no thread may touch them
        with _large_pictures(), progress(what, len(items), "pictures", getattr(rank_zero_only, "rank", 0) == 0) as bar:
            for _ in pool.map(work, items):
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def _free_memory() -> int | None:
    """Bytes that could be taken, or a bound of them; None where the system tells nothing."""
    bounds = []
    try:
        with open("/proc/meminfo") as file:
            bounds += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    except OSError:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            bounds.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _CONTROL_GROUPS:  # of a container
        try:
            bounds.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return min(bounds, default=None)
