"""MNIST (LeCun, Cortes and Burges, 1998) and Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv:1708.07747).

Both are 60,000 training and 10,000 test images of 28x28 pixels, in idx files of the same names and sizes.
"""

import gzip
import math
import os
import struct
from pathlib import Path

from torch import Tensor
from torchvision.datasets.mnist import read_image_file, read_label_file

from ddpm_lightning.data.official import REMEDY, OfficialData, folder_inside
from ddpm_lightning.data.untrusted import opened
from ddpm_lightning.errors import InputError

__all__ = ["MNIST", "FashionMNIST"]

_SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


class MNIST(OfficialData):
    """The official 60,000 training and 10,000 test images of digits, untouched; 256 grey levels, 10 classes.

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
    title = "MNIST"
    folder = "MNIST/raw"
    train_files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    test_files = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    train_size = 60_000
    test_size = 10_000
    megabytes = 12

    def _unpack(self, missing: list[str]) -> None:
        for name in missing:
            _unpack(self.raw / name)

    def _check_files(self, names: list[str]) -> None:
        for name in names:
            _check_idx(self.raw / name)

    def _read(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        self._check_files([*names])
        images, labels = (str(self.raw / name) for name in names)
        # torchvision's MNIST class would prefer an old MNIST/processed/*.pt, unchecked, to these files
        return read_image_file(images).unsqueeze(1), read_label_file(labels)


class FashionMNIST(MNIST):
    """The official 60,000 training and 10,000 test images of clothes, untouched; 256 grey levels, 10 classes.

    Args:
        root: folder that holds ``FashionMNIST/raw`` with the four unpacked idx files (or their .gz). Nothing is written
            to it when they are there.
        val_size: how many of the 60,000 training images are set aside for validation, 1..59999. They are drawn once
            and for all.
        download: fetch the files on first use when they are missing.
    """

    title = "FashionMNIST"
    folder = "FashionMNIST/raw"
    megabytes = 31


def _unpack(path: Path) -> None:
    """Make an idx file of the .gz beside it, if there is one."""
    packed, count = path.with_name(f"{path.name}.gz"), _idx_bytes(path.name)
    if not packed.exists():
        return
    try:
        with opened(packed) as file, gzip.open(file) as unpacked:
            # not more than the file can hold: ten megabytes may stand for ten gigabytes
            content = unpacked.read(count + 1)
        if len(content) != count:
            raise InputError(f"{packed} does not hold the {count} bytes of {path.name}")
    except InputError as error:
        raise InputError(f"{error}. Delete it and run again, or put a good copy there") from None
    try:
        with folder_inside(path.parent) as folder:
            (folder / path.name).write_bytes(content)
            os.replace(folder / path.name, path)
    except OSError as error:
        raise InputError(
            f"{packed} cannot be unpacked where it lies ({error}). Copy it to a folder that can be written to and set "
            "--data.root accordingly"
        ) from None


def _idx_bytes(name: str) -> int:
    shape = _SHAPES[name]
    return 4 * (1 + len(shape)) + math.prod(shape)


def _check_idx(path: Path) -> None:
    """Compare an idx file's header (big-endian: magic number, then one length per dimension) and size with MNIST's."""
    shape = _SHAPES[path.name]
    header = struct.Struct(f">{1 + len(shape)}I")
    expected_header = (0x0800 + len(shape), *shape)  # 0x08: unsigned bytes
    expected_bytes = _idx_bytes(path.name)
    try:
        with opened(path) as file:
            start = file.read(header.size)
            found_bytes = os.fstat(file.fileno()).st_size
    except InputError as error:
        raise InputError(f"{error}. {REMEDY}") from None
    what = "x".join(map(str, shape))
    if found_bytes != expected_bytes:
        raise InputError(
            f"{path} is damaged or another file: expected {what} uint8 = {expected_bytes} bytes with the header,"
            f" found {found_bytes} bytes. {REMEDY}"
        )
    if start != header.pack(*expected_header):
        raise InputError(
            f"{path} is damaged or another file: expected {what} uint8, that is the header {expected_header}, found"
            f" {header.unpack(start)}. {REMEDY}"
        )
