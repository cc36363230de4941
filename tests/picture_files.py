"""Folders of made-up pictures, and stand-ins for CIFAR-10's files in their own format."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

__all__ = ["CIFAR_FILES", "cifar_batch", "pixels", "save", "write_cifar"]

CIFAR_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
ROWS, LENGTH = 10_000, 3_072


def pixels(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    """uint8 ``[H, W, 3]``, or ``[H, W]`` where there is one channel."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def save(path: Path, values: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def cifar_batch(first: bytes, classes: bytes, name: bytes = b"numpy\nndarray") -> tuple[bytes, bytes]:
    """What is before and after the 30,720,000 bytes of pixels in a batch file, written as Python 2's cPickle wrote it.

    Args:
        first: pixels of the first pictures, the rest is black.
        classes: of the pictures, over and over.
        name: stands in the place of the array's class.
    """
    labels = b"".join(b"K" + bytes([classes[row % len(classes)]]) for row in range(ROWS))
    start = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05("
        + labels
        + b"eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07c"
        + name
        + b"\nq\x08K\x00\x85U\x01b\x87Rq\x09(K\x01M\x10'M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", ROWS * LENGTH) + first
    )
    return start, b"tbu."


def write_cifar(root: Path, patch: pytest.MonkeyPatch, name: bytes = b"numpy\nndarray") -> Path:
    """All six files in ``root/cifar-10-batches-py``, the folder that is returned, with md5s that torchvision now lists.

    The first picture of file k has red k, green k + 10 and blue k + 20 everywhere, and class k; the others are black.
    """
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    listed = []
    for k, file in enumerate(CIFAR_FILES):
        first = b"".join(bytes([level]) * 1_024 for level in (k, k + 10, k + 20))
        start, end = cifar_batch(first, bytes([k, 9, 0, 1]), name)
        content = start + bytes(ROWS * LENGTH - len(first)) + end
        (folder / file).write_bytes(content)
        listed.append([file, hashlib.md5(content).hexdigest()])
    patch.setattr(torchvision.datasets.CIFAR10, "train_list", listed[:5])
    patch.setattr(torchvision.datasets.CIFAR10, "test_list", listed[5:])
    return folder
