"""What is known of the images: files of images and masks, and the sampler that draws the rest."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddpm_lightning.data import levels_to_model
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers import InpaintingFactory, ReplacementSampler, Sampler

__all__ = ["Inpainting", "read_images", "read_inpainting", "read_mask"]


@dataclass(frozen=True, eq=False)
class Inpainting:
    """Pixels that are known. One image or mask serves all images.

    Attributes:
        known: uint8 ``[n or 1, C, H, W]``, grey levels.
        mask: bool ``[n or 1, C or 1, H, W]``, True where a pixel is known.
        factory: makes the sampler of the other pixels.
    """

    known: Tensor
    mask: Tensor
    factory: InpaintingFactory = ReplacementSampler

    def sampler(self, sampler: Sampler, rows: Tensor, levels: int) -> Sampler:
        """The sampler of the images whose known pixels stand in the given rows ``[B]``."""
        known, mask = (values if len(values) == 1 else values[rows] for values in (self.known, self.mask))
        return self.factory(sampler, levels_to_model(known, levels), mask)


def read_inpainting(
    known: str | None, mask: str | None, factory: InpaintingFactory | None, n: int, shape: tuple[int, ...], levels: int
) -> Inpainting | None:
    """What ``--known``, ``--mask`` and ``--inpainting`` say of n images of a model; None where none is given.

    Raises:
        InputError: one without the other, files that cannot be read or do not fit, neither one nor ``n`` images.
    """
    if known is None and mask is None and factory is None:
        return None
    if known is None or mask is None:
        lacking = " and ".join(f"{option} FILE" for option, path in (("--known", known), ("--mask", mask)) if not path)
        raise InputError(f"inpainting needs {lacking} too: the images, and which of their pixels are known")
    images, pixels = read_images(Path(known), shape, levels), read_mask(Path(mask), shape)
    for option, path, values in (("--known", known, images), ("--mask", mask, pixels)):
        if len(values) not in (1, n):
            raise InputError(f"{option} {path} is for {len(values)} images: give one, or as many as --n, which is {n}")
    return Inpainting(images, pixels, factory or ReplacementSampler)


def read_images(path: Path, shape: tuple[int, ...], levels: int) -> Tensor:
    """Images that are known, for ``--known``: uint8 grey levels ``[n, C, H, W]``.

    Args:
        path: a picture of one image, black to white; or a file of ``ddpm sample``, .safetensors or .npz, whose
            ``images`` are uint8 grey levels ``[n, C, H, W]``.
        shape: (C, H, W) that they must have.
        levels: number of grey levels.

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
    """Which pixels of images of a shape (C, H, W) are known, for ``--mask``: bool ``[n, C or 1, H, W]``.

    The file is a black and white picture, white where a pixel is known; or .safetensors or .npz with a bool ``mask``,
    ``[H, W]``, ``[C or 1, H, W]`` or ``[n, C or 1, H, W]``.

    Raises:
        InputError: no such file, not of that size, grey pixels.
    """
    mask = _tensor(path, "mask", "--mask")
    if mask is None:
        picture = _picture(path, "--mask", "L")
        mask = picture == 255
        if not bool((mask | (picture == 0)).all()):
            raise InputError(f"--mask {path} must be black and white: white where a pixel is known")
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
