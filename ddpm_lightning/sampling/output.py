"""Files of images: written image by image by any number of processes, and read as what is known of images."""

import io
import json
import math
import shutil
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = ["ImageFile", "check_space", "read_first", "read_images", "read_mask", "write_npz"]

# images that are in memory at a time when a file is converted
_CHUNK = 4096


class ImageFile:
    """A safetensors file that is filled image by image, so that memory does not grow with their number.

    Such a file is a header and raw bytes: it is laid out in full at once, and every image then has its place, whichever
    process of a shared file system writes it and when. Until :meth:`finish` it is called ``NAME.partial``.

    Args:
        path: the file to be.
        n: number of images.
        shape: (C, H, W) of the images.
        labelled: with a class for each image.
        metadata: the file's.
    """

    def __init__(
        self, path: Path, n: int, shape: tuple[int, ...], labelled: bool = False, metadata: Mapping[str, str] = {}
    ) -> None:
        self.path, self.n, self.shape = path, n, tuple(shape)
        self.written = 0
        """Images written by this object."""
        tensors = {"labels": ("I64", [n], 8 * n)} if labelled else {}
        tensors["images"] = ("U8", [n, *shape], n * math.prod(shape))
        self._places: dict[str, int] = {}
        described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, (dtype, size, count) in tensors.items():
            self._places[name] = end
            described[name] = {"dtype": dtype, "shape": size, "data_offsets": [end, end + count]}
            end += count
        text = json.dumps(described).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self.size = len(self._header) + end
        """Bytes of the file."""

    @property
    def partial(self) -> Path:
        """What the file is called until it is finished."""
        return self.path.with_name(f"{self.path.name}.partial")

    def create(self) -> None:
        """Lay the file out: once, before any process writes. A partial one of an interrupted sampling is replaced."""
        with self.partial.open("wb") as file:
            file.write(self._header)
            file.truncate(self.size)

    def write(self, indices: Tensor, images: Tensor, labels: Tensor | None = None) -> None:
        """Put images in their places.

        Args:
            indices: int64 ``[B]`` of the images, 0..n-1.
            images: uint8 ``[B, C, H, W]``.
            labels: int64 ``[B]``, for a file with classes.

        Raises:
            InputError: the disk is full.
        """
        parts = {"images": images.cpu().numpy()}
        if labels is not None:
            parts["labels"] = labels.cpu().numpy().astype("<i8")
        try:
            with self.partial.open("r+b") as file:
                for name, values in parts.items():
                    start = len(self._header) + self._places[name]
                    for index, value in zip(indices.tolist(), values, strict=True):
                        file.seek(start + index * value.nbytes)
                        file.write(value.tobytes())
        except OSError as error:
            raise InputError(f"--out {self.path.parent} cannot be written to: {error.strerror}") from error
        self.written += len(indices)

    def finish(self) -> None:
        """Give the file its name: once, when every process has written its images."""
        self.partial.replace(self.path)


def write_npz(source: Path, target: Path) -> None:
    """A safetensors file as NumPy's, in chunks; its metadata become strings beside the arrays.

    Args:
        source: the safetensors file.
        target: the file to be, which appears when it is complete.
    """
    partial = target.with_name(f"{target.name}.partial")
    with safe_open(source, "np") as tensors, zipfile.ZipFile(partial, "w") as archive:
        for name in tensors.keys():  # noqa: SIM118  # not a mapping
            rows = tensors.get_slice(name)
            count = rows.get_shape()[0]
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                described = np.lib.format.dtype_to_descr(rows[:1].dtype)
                header = {"descr": described, "fortran_order": False, "shape": tuple(rows.get_shape())}
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, count, _CHUNK):
                    file.write(rows[start : min(start + _CHUNK, count)].tobytes())
        for name, value in (tensors.metadata() or {}).items():
            buffer = io.BytesIO()
            np.save(buffer, np.array(value))
            archive.writestr(f"{name}.npy", buffer.getvalue())
    partial.replace(target)


def read_first(path: Path, count: int) -> Tensor:
    """The first images of a safetensors file, uint8 ``[<= count, C, H, W]``; the others are not read."""
    with safe_open(path, "pt") as tensors:
        rows = tensors.get_slice("images")
        images: Tensor = rows[: min(count, rows.get_shape()[0])]
    return images


def check_space(folder: Path, needed: int, n: int) -> None:
    """Make a folder, and see that it can be written to and has room.

    Args:
        folder: made where there is none.
        needed: bytes.
        n: number of images, for the message.

    Raises:
        InputError: it cannot be written to, or has less free space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written to ({error.strerror}): choose another folder") from None
    if needed > free:
        raise InputError(
            f"--n {n} images take {needed / 1e9:.3g} GB and --out {folder} has {free / 1e9:.3g} GB free: "
            "choose fewer, or another folder"
        )


def read_images(path: Path, shape: tuple[int, ...], levels: int) -> Tensor:
    """Images that are known, for ``--known``.

    Args:
        path: a picture of one image, black to white; or a file of ``ddpm sample``, .safetensors or .npz, whose
            ``images`` are uint8 grey levels ``[n, C, H, W]``.
        shape: (C, H, W) that they must have.
        levels: number of grey levels.

    Returns:
        uint8 ``[n, C, H, W]``, grey levels.

    Raises:
        InputError: no such file, or not of that shape.
    """
    tensor = _tensor(path, "images", "--known")
    if tensor is None:
        picture = _picture(path, "--known", "RGB" if shape[0] == 3 else "L")
        tensor = (picture[None].double() * ((levels - 1) / 255)).round().to(torch.uint8)
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != tuple(shape) or not len(tensor):
        raise InputError(
            f"--known {path} holds images of shape {list(tensor.shape[1:])} (channels, height, width): "
            f"this model's are {list(shape)}"
        )
    if tensor.dtype != torch.uint8 or int(tensor.max()) >= levels:
        raise InputError(
            f"--known {path}: images must be uint8 grey levels 0..{levels - 1}, as ddpm sample writes them"
        )
    return tensor


def read_mask(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Which pixels are known, for ``--mask``.

    Args:
        path: a black and white picture, white where a pixel is known; or .safetensors or .npz with a bool ``mask``,
            ``[H, W]``, ``[C or 1, H, W]`` or ``[n, C or 1, H, W]``.
        shape: (C, H, W) of the images.

    Returns:
        bool ``[n, C or 1, H, W]``.

    Raises:
        InputError: no such file, not of that size, grey pixels.
    """
    mask = _tensor(path, "mask", "--mask")
    if mask is None:
        picture = _picture(path, "--mask", "L")
        if not bool(((picture == 0) | (picture == 255)).all()):
            raise InputError(f"--mask {path} must be black and white: white where a pixel is known")
        mask = picture == 255
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.dtype != torch.bool or mask.ndim != 4 or not len(mask):
        raise InputError(f"--mask {path}: mask must be bool [height, width] or [n, channels or 1, height, width]")
    if mask.shape[2:] != shape[1:] or mask.shape[1] not in (1, shape[0]):
        raise InputError(
            f"--mask {path} is for images of shape {list(mask.shape[1:])} (channels, height, width): "
            f"this model's are {list(shape)}"
        )
    return mask


def _tensor(path: Path, name: str, option: str) -> Tensor | None:
    """The tensor of that name in a .safetensors or .npz file; None for a file of another kind."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                return tensors.get_tensor(name)
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return torch.from_numpy(arrays[name])
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile, SafetensorError) as error:
        raise InputError(f"{option} {path} cannot be read as {name}: {error}") from None
    return None


def _picture(path: Path, option: str, mode: str) -> Tensor:
    """uint8 ``[C, H, W]``, 0..255."""
    try:
        with Image.open(path) as image:
            values = np.array(image.convert(mode))
    except (OSError, UnidentifiedImageError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no picture"
        raise InputError(f"{option} {path} cannot be read: {reason}") from None
    return torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1)
