"""CIFAR-10: 60,000 photographs of 32x32 pixels in colour (Krizhevsky, 2009, Learning multiple layers of features)."""

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from ddpm_lightning.data.official import REMEDY, OfficialData, folder_inside
from ddpm_lightning.data.untrusted import opened
from ddpm_lightning.errors import InputError

__all__ = ["CIFAR10"]

_MOST_BYTES = 40_000_000  # of a file: the official ones have 31 million

# what arrays are pickled with; the files are Python 2's, so the names are those of numpy 1
_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class CIFAR10(OfficialData):
    """The official 50,000 training and 10,000 test images in colour, untouched; 256 levels a channel, 10 classes.

    The files are pickles. Each must have the md5 that torchvision lists, and even then it is read by an unpickler that
    knows arrays and nothing else: nothing in a file is run.

    Args:
        root: folder that holds ``cifar-10-batches-py`` with the six unpacked files (or ``cifar-10-python.tar.gz``).
            Nothing is written to it when they are there.
        val_size: how many of the 50,000 training images are set aside for validation, 1..49999. They are drawn once
            and for all.
        download: fetch the files on first use when they are missing.
    """

    shape = (3, 32, 32)
    levels = 256
    num_classes = 10
    title = "CIFAR10"
    folder = "cifar-10-batches-py"
    train_files = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
    test_files = ("test_batch",)
    train_size = 50_000
    test_size = 10_000
    megabytes = 170

    def _unpack(self, missing: list[str]) -> None:
        packed = self.raw.parent / torchvision.datasets.CIFAR10.filename
        if not packed.exists():
            return
        try:
            with opened(packed) as file:
                found = hashlib.file_digest(file, _md5).hexdigest()  # type: ignore[arg-type]  # it is a file
                if found != (expected := torchvision.datasets.CIFAR10.tgz_md5):
                    raise InputError(_damaged(packed, found, expected))
        except InputError as error:
            raise InputError(f"{error}. Delete it and run again, or put a good copy there") from None
        try:
            self.raw.mkdir(exist_ok=True)
            with folder_inside(self.raw) as folder, tarfile.open(packed) as archive:
                for name in missing:
                    # by name, and nothing else that the archive may hold
                    content = archive.extractfile(f"{self.folder}/{name}")
                    (folder / name).write_bytes(content.read() if content else b"")
                for name in missing:
                    os.replace(folder / name, self.raw / name)
        except OSError as error:
            raise InputError(
                f"{packed} cannot be unpacked where it lies ({error}). Copy it to a folder that can be written to and "
                "set --data.root accordingly"
            ) from None

    def _check_files(self, names: list[str]) -> None:
        for name in names:
            _checked(self.raw / name)

    def _read(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        batches = [_unpickled(self.raw / name) for name in names]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, *self.shape)
        labels = [label for batch in batches for label in batch["labels"]]
        return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")
        return _KNOWN[module, name]


def _unpickled(path: Path) -> dict[str, Any]:
    content = _checked(path)
    try:
        batch: dict[str, Any] = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} cannot be read: {error}. {REMEDY}") from None
    return batch


def _checked(path: Path) -> bytes:
    """The content of a file whose md5 is the one that torchvision lists."""
    cifar = torchvision.datasets.CIFAR10
    expected = dict(map(tuple, cifar.train_list + cifar.test_list))[path.name]
    try:
        with opened(path) as file:
            content = file.read(_MOST_BYTES)
    except InputError as error:
        raise InputError(f"{error}. {REMEDY}") from None
    if (found := _md5(content).hexdigest()) != expected:
        raise InputError(f"{_damaged(path, found, expected)}. {REMEDY}")
    return content


def _md5(content: bytes = b"") -> "hashlib._Hash":
    return hashlib.md5(content, usedforsecurity=False)


def _damaged(path: Path, found: str, expected: str) -> str:
    return f"{path} is damaged or another file: its md5 is {found}, and that of CIFAR10's is {expected}"
