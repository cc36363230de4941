"""What a sampling writes: one file that any number of processes fill, and its folder."""

import json
import math
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = ["ImageFile", "check_folder", "whole"]


class ImageFile:
    """A safetensors file that is filled image by image, so that memory does not grow with their number.

    Such a file is a header and raw bytes: it is laid out in full at once, and every image then has its place, whichever
    process of a shared file system writes it and when. Until :meth:`finish` it is called ``NAME.partial``.

    Args:
        path: the file to be.
        n: number of images.
        shape: (C, *space) of the images.
        labelled: with a class for each image.
        real: float32 instead of uint8.
        metadata: the file's.

    Attributes:
        size: bytes of the file.
        written: images written by this object.
    """

    def __init__(
        self,
        path: Path,
        n: int,
        shape: tuple[int, ...],
        labelled: bool = False,
        metadata: Mapping[str, str] = {},
        real: bool = False,
    ) -> None:
        self.path, self.n, self.metadata, self.written = path, n, dict(metadata), 0
        self.partial = path.with_name(f"{path.name}.partial")
        tensors: list[tuple[str, str, str, tuple[int, ...]]] = [("labels", "I64", "<i8", (n,))] if labelled else []
        header: dict[str, object] = {"__metadata__": self.metadata}
        places, end = {}, 0
        kind = ("F32", "<f4") if real else ("U8", "u1")
        for name, code, dtype, size in [*tensors, ("images", *kind, (n, *shape))]:
            start, end = end, end + np.dtype(dtype).itemsize * math.prod(size)
            header[name] = {"dtype": code, "shape": size, "data_offsets": (start, end)}
            places[name] = dtype, start, size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        first = len(self._header)
        self.size = first + end
        self._places = {name: (dtype, first + start, size) for name, (dtype, start, size) in places.items()}

    def create(self) -> None:
        """Lay the file out: once, before any process writes. What an interrupted sampling left is replaced.

        Raises:
            InputError: it cannot be made.
        """
        with _refusing(self.path.parent):
            # of a link the name goes, and not what it leads to
            self.partial.unlink(missing_ok=True)
            with self.partial.open("xb") as file:
                file.write(self._header)
                file.truncate(self.size)

    def write(self, indices: Tensor, images: Tensor, labels: Tensor | None = None) -> None:
        """Put images in their places.

        Args:
            indices: int64 ``[B]`` of the images, 0..n-1.
            images: uint8 ``[B, C, H, W]``, or float32 ``[B, C, *space]`` of fields.
            labels: int64 ``[B]``, for a file with classes.

        Raises:
            InputError: the disk is full.
        """
        parts = {"images": images} if labels is None else {"images": images, "labels": labels}
        # not through a map: there a full disk kills the process
        with _refusing(self.path.parent), self.partial.open("r+b") as file:
            for name, values in parts.items():
                dtype, start, _ = self._places[name]
                for index, value in zip(indices.tolist(), values.cpu().numpy().astype(dtype), strict=True):
                    file.seek(start + index * value.nbytes)
                    file.write(value.tobytes())
        self.written += len(indices)

    def arrays(self) -> dict[str, np.ndarray]:
        """What was written, by name, mapped from the disk."""
        places = self._places.items()
        return {name: np.memmap(self.partial, dtype, "r", offset, size) for name, (dtype, offset, size) in places}

    def finish(self, npz: bool = False) -> Path:
        """Give the file its name, once every process has written its images, and return its path.

        With ``npz`` it becomes a NumPy file, whose metadata are strings beside the arrays.
        """
        if not npz:
            return self.partial.replace(self.path)
        path = self.path.with_suffix(".npz")
        with whole(path) as fresh:
            contents: dict[str, Any] = {**self.arrays(), **self.metadata}
            np.savez(fresh, **contents)  # in pieces, since the arrays are mapped
        self.partial.unlink()
        return path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``path`` when the context is left without an error.

    Raises:
        InputError: it cannot be written.
    """
    with _refusing(path.parent), tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield (fresh := Path(folder) / path.name)
        fresh.replace(path)


def check_folder(folder: Path, needed: int, n: int) -> None:
    """Make a folder, and see that it can be written to and has room for ``needed`` bytes, those of ``n`` images.

    Raises:
        InputError: it cannot be written to, has less free space, or holds a folder where a file is to be.
    """
    with _refusing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
        for path in sorted(folder.glob("samples.*")):
            if path.is_dir() and not path.is_symlink():
                raise InputError(f"{path} is a folder where a file is to be: remove it, or choose another --out")
    if needed > free:
        raise InputError(
            f"--n {n} images take {needed / 1e9:.3g} GB and --out {folder} has {free / 1e9:.3g} GB free: "
            "choose fewer, or another folder"
        )


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written to ({error.strerror}): choose another folder") from error
