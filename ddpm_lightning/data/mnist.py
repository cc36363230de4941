"""MNIST: 70,000 handwritten digits of 28x28 pixels (LeCun, Cortes and Burges, 1998)."""

import contextlib
import gzip
import http.client
import io
import math
import os
import socket
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torchvision.datasets.mnist import read_image_file, read_label_file

from ddpm_lightning.data.batches import Split
from ddpm_lightning.data.datamodule import ImageDataModule, SplitName
from ddpm_lightning.data.untrusted import opened
from ddpm_lightning.errors import InputError

__all__ = ["MNIST"]

_TRAIN_IMAGES, _TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
_TEST_IMAGES, _TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
_FILES = {
    _TRAIN_IMAGES: (60_000, 28, 28),
    _TRAIN_LABELS: (60_000,),
    _TEST_IMAGES: (10_000, 28, 28),
    _TEST_LABELS: (10_000,),
}

# Not an option: results of different runs are comparable only on the same split.
_SPLIT_SEED = 60_000

_DOWNLOAD_TIMEOUT_S = 30.0


class MNIST(ImageDataModule):
    """The official 60,000 training and 10,000 test images, untouched; 256 grey levels, 10 classes.

    The validation images are drawn from the training images once and for all: for a given val_size they are the same
    in every run, and a larger val_size adds images to them. The first 5,000 test images are the easier half (cleaner
    writing), so a result with limit_test is no estimate of the whole one.

    Args:
        root: folder that holds ``MNIST/raw`` with the four unpacked idx files (or their .gz). Nothing is written to it
            when they are there.
        val_size: how many of the 60,000 training images are set aside for validation, 1..59999.
        download: fetch the files on first use when they are missing.
    """

    shape = (1, 28, 28)
    levels = 256
    num_classes = 10

    def __init__(self, root: str = "data", val_size: int = 5_000, download: bool = True, **kwargs: Any) -> None:
        if not isinstance(val_size, int) or not 1 <= val_size < 60_000:
            raise InputError(f"--data.val_size={val_size!r} must be a whole number from 1 to 59999")
        super().__init__({"train": 60_000 - val_size, "val": val_size, "test": 10_000}, **kwargs)
        self.root, self.val_size, self.download = root, val_size, download

    @property
    def raw(self) -> Path:
        """The folder of the idx files, absolute."""
        return (Path(self.root).expanduser() / "MNIST" / "raw").resolve()

    def prepare_data(self) -> None:
        """Unpack or download what is missing, and check all four files; InputError where that fails."""
        for name in self._missing():
            self._unpack(name)
        missing = self._missing()
        # before the download: a damaged file is the user's to mend, with or without network
        for name in _FILES:
            if name not in missing:
                _check_idx(self.raw / name)
        if missing and not self.download:
            raise self._missing_error(missing, "and --data.download=false forbids fetching them")
        if missing:
            self._fetch(missing)

    def load(self, split: SplitName) -> Split:
        images_name, labels_name = (_TEST_IMAGES, _TEST_LABELS) if split == "test" else (_TRAIN_IMAGES, _TRAIN_LABELS)
        if missing := [name for name in self._missing() if name in (images_name, labels_name)]:
            raise self._missing_error(missing, "and prepare_data() was not run on this machine")
        _check_idx(self.raw / images_name)
        _check_idx(self.raw / labels_name)
        # torchvision's MNIST class would prefer an old MNIST/processed/*.pt, unchecked, to these files
        images = read_image_file(str(self.raw / images_name)).unsqueeze(1)
        labels = read_label_file(str(self.raw / labels_name))
        if split == "test":
            return Split(images, labels)
        order = torch.randperm(60_000, generator=torch.Generator().manual_seed(_SPLIT_SEED))
        rows = order[: self.val_size] if split == "val" else order[self.val_size :]
        return Split(images[rows], labels[rows])

    def _missing(self) -> list[str]:
        return [name for name in _FILES if not (self.raw / name).exists()]

    def _missing_error(self, missing: list[str], why: str) -> InputError:
        return InputError(
            f"MNIST files are missing: {', '.join(missing)}. Looked in {self.raw} (--data.root={self.root}), {why}."
            " Put them there, set --data.root to the folder that holds MNIST/raw, or run on the embedded digits"
            " instead: -c configs/digits.yaml"
        )

    def _unpack(self, name: str) -> None:
        packed = self.raw / f"{name}.gz"
        if not packed.exists():
            return
        try:
            with opened(packed) as file, gzip.open(file) as unpacked:
                # not more than the file can hold: ten megabytes may stand for ten gigabytes
                content = unpacked.read(_idx_bytes(name) + 1)
            if len(content) != _idx_bytes(name):
                raise InputError(f"{packed} does not hold the {_idx_bytes(name)} bytes of {name}")
        except InputError as error:
            raise InputError(f"{error}. Delete it and run again, or put a good copy there") from None
        try:
            with _folder_inside(self.raw) as folder:
                (folder / name).write_bytes(content)
                os.replace(folder / name, self.raw / name)
        except OSError as error:
            raise InputError(
                f"{packed} cannot be unpacked where it lies ({error}). Copy it to a folder that can be written to and"
                " set --data.root accordingly"
            ) from None

    def _fetch(self, missing: list[str]) -> None:
        print(f"downloading MNIST (12 MB) to {self.raw}", file=sys.stderr, flush=True)
        try:
            self.raw.mkdir(parents=True, exist_ok=True)
            # torchvision writes straight to its target and takes any file of the right name for a whole one. So it
            # gets a folder of its own, and only whole files (it compares the md5 of the .gz) move to the real one.
            with _folder_inside(self.raw) as folder, _quiet_and_impatient():
                torchvision.datasets.MNIST(str(folder), download=True)
                for name in missing:
                    os.replace(folder / "MNIST" / "raw" / name, self.raw / name)
        except (OSError, RuntimeError, EOFError, zlib.error, http.client.HTTPException) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise self._missing_error(missing, f"and the download failed ({why})") from None
        for name in missing:
            _check_idx(self.raw / name)


@contextlib.contextmanager
def _folder_inside(parent: Path) -> Iterator[Path]:
    """A passing folder on the same disk as ``parent``, so that a move from it to there is atomic."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=parent) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _quiet_and_impatient() -> Iterator[None]:
    """No progress bars on stderr, and an unanswered connection fails instead of hanging for ever."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)


def _idx_bytes(name: str) -> int:
    shape = _FILES[name]
    return 4 * (1 + len(shape)) + math.prod(shape)


def _check_idx(path: Path) -> None:
    """Compare an idx file's header (big-endian: magic number, then one length per dimension) and size with MNIST's."""
    shape = _FILES[path.name]
    remedy = "Delete it and run again (--data.download=true fetches it anew), or put a good copy there"
    header = struct.Struct(f">{1 + len(shape)}I")
    expected_header = (0x0800 + len(shape), *shape)  # 0x08: unsigned bytes
    expected_bytes = _idx_bytes(path.name)
    try:
        with opened(path) as file:
            start = file.read(header.size)
            found_bytes = os.fstat(file.fileno()).st_size
    except InputError as error:
        raise InputError(f"{error}. {remedy}") from None
    what = "x".join(map(str, shape))
    if found_bytes != expected_bytes:
        raise InputError(
            f"{path} is damaged or another file: expected {what} uint8 = {expected_bytes} bytes with the header,"
            f" found {found_bytes} bytes. {remedy}"
        )
    if start != header.pack(*expected_header):
        raise InputError(
            f"{path} is damaged or another file: expected {what} uint8, that is the header {expected_header}, found"
            f" {header.unpack(start)}. {remedy}"
        )
