"""Arrays and pictures in files of others: what a file says of itself is compared with what is needed before it is read.

So neither memory nor time depends on what a file claims to hold, nothing in it is run, and a pipe is not waited for.
Every InputError begins with the file's path.
"""

import io
import math
import os
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image
from safetensors import safe_open
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = [
    "OWN_FORMATS",
    "decode",
    "opened",
    "opened_picture",
    "read_array",
    "read_picture",
    "shape_of",
    "wrong_shape",
]

OWN_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
"""What pictures of the user's own may be."""

Check = Callable[[tuple[int, ...], str], None]
"""Raises InputError for a shape, or a type of number (numpy's name), that is not wanted."""

_MAX_NPY_HEADER = 10_000  # numpy's own limit
_FORMATS = ("PNG", "JPEG", "BMP", "GIF")  # of strangers: others of PIL's run programs or libraries of their own
_GREY, _COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P", "PA")
_TRANSPARENT = "has transparent pixels, which have no colour: save it without transparency"
_BITS_PER_SAMPLE = 258  # a tag of TIFF
# what turns a picture upright, by its EXIF orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SAFETENSORS_TYPES = {"BOOL": "bool", "U8": "uint8"}


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file, opened for reading.

    Raises:
        InputError: there is no such file, it is a folder, a pipe or a device, or what is done with it fails.
    """
    try:
        # to open a pipe in the usual way is to wait for what never comes
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{path} cannot be read: it is a pipe or a device")
            yield file
    except InputError:
        raise
    except Exception as error:  # the readers of damaged files raise whatever they run into
        known = isinstance(error, OSError) and error.strerror
        reason = known or " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}") from error


def read_array(path: Path, name: str, check: Check) -> Tensor:
    """An array of bytes, uint8 or bool, in a .npz or .safetensors file.

    Args:
        path: the file.
        name: of the array in it.
        check: sees shape and type before anything is read.

    Raises:
        InputError: no such file or array, a damaged file; what ``check`` raises, which must refuse other types.
    """
    with opened(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise InputError(f"{path} cannot be read: it is empty")
        if path.suffix.lower() == ".safetensors":
            return _from_safetensors(path, name, check)
        return _from_npz(path, file, name, check)


def _from_safetensors(path: Path, name: str, check: Check) -> Tensor:
    with safe_open(path, "pt") as file:
        if name not in (names := list(file.keys())):
            raise InputError(_lacking(path, name, names))
        declared = file.get_slice(name)
        kind = declared.get_dtype()
        check(tuple(declared.get_shape()), _SAFETENSORS_TYPES.get(kind, kind))
        return _in_range(file.get_tensor(name))


def _from_npz(path: Path, file: IO[bytes], name: str, check: Check) -> Tensor:
    with zipfile.ZipFile(file) as archive:
        names = [each.removesuffix(".npy") for each in archive.namelist()]
        if name not in names:
            raise InputError(_lacking(path, name, names))
        entry = archive.infolist()[names.index(name)]
        if entry.flag_bits & 1:
            raise InputError(f"{path} cannot be read: it is encrypted; save it without a password")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{path} cannot be read: it is compressed as numpy does not: use numpy.savez")
        with archive.open(entry) as member:
            start = io.BytesIO(member.read(_MAX_NPY_HEADER))
            version = np.lib.format.read_magic(start)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read_header(start, _MAX_NPY_HEADER)
            check(shape, str(dtype))
            count = math.prod(shape)
            content = start.read()
            # one byte more than there should be, so that the end and its checksum are seen
            content += member.read(max(0, count + 1 - len(content)))
    if len(content) != count:
        raise InputError(f"{path} cannot be read: {name} is not as long as its shape {list(shape)}")
    values = np.frombuffer(bytearray(content), dtype).reshape(shape, order="F" if fortran else "C")
    return _in_range(torch.from_numpy(np.ascontiguousarray(values)))


def _in_range(values: Tensor) -> Tensor:
    """A bool of another byte than 0 and 1 would be true to some operations and false to others."""
    return values if values.dtype != torch.bool else values.view(torch.uint8) != 0


def _lacking(path: Path, name: str, names: list[str]) -> str:
    there = ", ".join(sorted(names)[:5])[:120] or "nothing"
    return f"{path} holds no array {name}, only {there}"


def wrong_shape(path: Path, found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """The sentence about images (C, H, W) that are not of a model's shape."""
    return f"{path} holds images of shape {list(found)} (channels, height, width): this model's are {list(shape)}"


def read_picture(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A picture of 8 bits a channel, uint8 ``[C, H, W]``, 0..255.

    Args:
        path: PNG, JPEG, BMP or GIF.
        shape: (C, H, W) that it must have, C 1 or 3. A picture in colour is taken for a grey one if its channels are
            equal; a grey one is not taken for one in colour.

    Raises:
        InputError: no such file, a damaged one, another size; colours where none are, or none where some are;
            transparent pixels, 16 bits, several frames, inks (CMYK).
    """
    with opened(path) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large pictures: the size is compared before anything is decoded
                image = Image.open(file, formats=_FORMATS)
        except Image.UnidentifiedImageError:
            kinds = f"neither {', '.join(_FORMATS)}, nor .npz or .safetensors"
            raise InputError(f"{path} cannot be read: it is no picture ({kinds})") from None
        with image:
            if image.size != (shape[2], shape[1]):
                raise InputError(wrong_shape(path, (shape[0], *image.size[::-1]), shape))
            if wrong := _misleading(image, file):
                raise InputError(f"{path} {wrong}")
            image.load()
            if wrong := _misread(image, shape[0]):
                raise InputError(f"{path} {wrong}")
            picture = _pixels(image.convert(_mode(image)))
    if shape[0] == 1 and len(picture) == 3:
        if bool((picture != picture[:1]).any()):
            raise InputError(f"{path} is in colour: it must be grey")
        picture = picture[:1]
    return picture


@contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """A picture of the user's own, of whose header alone is read: 8 bits a channel, grey or in colour, one frame.

    It may have any format of ``OWN_FORMATS``. Warnings of large pictures are the caller's to silence, who may have
    several threads.

    Raises:
        InputError: no such file, no picture, 16 bits, several frames, inks (CMYK); what is done with the picture fails.
    """
    with opened(path) as file:
        try:
            image = Image.open(file, formats=OWN_FORMATS)
        except Image.UnidentifiedImageError:
            raise InputError(f"{path} cannot be read: it is no picture, or a damaged one") from None
        with image:
            if wrong := _misleading(image, file):
                raise InputError(f"{path} {wrong}")
            yield image


def shape_of(image: Image.Image) -> tuple[int, int, int]:
    """(channels, height, width) of a picture that :func:`opened_picture` opened, as it is seen: turned upright."""
    width, height = image.size
    turned = _orientation(image) >= 5
    return (1 if image.mode in _GREY else 3), *((width, height) if turned else (height, width))


def decode(path: Path, image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """The pixels of a picture that :func:`opened_picture` opened, uint8 ``[C, H, W]``.

    A picture of another size than ``shape`` (C, H, W) is resized until it just covers this size, bicubic and with
    antialiasing, and what is too much is cut off, the same on both sides. Colours become grey as ITU-R 601 weighs them.

    Raises:
        InputError: transparent pixels.
    """
    channels, height, width = shape
    turn = _TURNS.get(_orientation(image))
    image.load()
    if _transparent(image):
        raise InputError(f"{path} {_TRANSPARENT}")
    if turn is not None:
        image = image.transpose(turn)
    # a palette in grey by way of its colours, as it would be without one
    image = image.convert(_mode(image)).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=_within(box, image.size))
    return _pixels(image)


def _within(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box without what rounding puts outside the picture."""
    return max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(size[0])), min(box[3], float(size[1]))


def _orientation(image: Image.Image) -> int:
    """Of a picture of which no more than the head was read; 1 where PIL turns the picture itself."""
    # a PNG's own getexif would decode all of it
    return 1 if image.format == "TIFF" else int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))


def _mode(image: Image.Image) -> str:
    return "L" if image.mode in _GREY else "RGB"


def _pixels(image: Image.Image) -> Tensor:
    values = np.array(image)
    return torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1)


def _misleading(image: Image.Image, file: IO[bytes]) -> str | None:
    """What a picture's header says that no array of 8 bits can."""
    # a telephone's picture (MPO) has a small copy of itself as its second frame
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return "has several frames: give a picture of one"
    bits = 8
    if image.format == "PNG":  # PIL cuts 16 bits of a colour to 8 and keeps quiet
        position = file.tell()
        file.seek(24)
        bits = file.read(1)[0]
        file.seek(position)
    elif image.format == "TIFF":
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,)))  # type: ignore[attr-defined]  # a TIFF has it
    if bits > 8 or image.mode not in (*_GREY, *_COLOUR):
        has = f"{bits} bits a channel" if bits > 8 else f"channels {image.mode}"
        return f"has {has}: save it with 8 bits, grey or RGB"
    return None


def _transparent(image: Image.Image) -> bool:
    alpha = "A" in image.mode or "transparency" in image.info
    return alpha and bool(np.array(image.convert("RGBA"))[..., 3].min() < 255)


def _misread(image: Image.Image, channels: int) -> str | None:
    """What an array without alpha, of so many channels, would not tell."""
    if _transparent(image):
        return _TRANSPARENT
    if channels not in (1, 3):
        return f"is a picture: images of {channels} channels must come in a .safetensors or .npz file"
    if channels == 3 and image.mode in _GREY:
        return "is grey: this model's images are in colour; save it as RGB if grey is what is known"
    return None
