"""What is known of the images: files of images and masks, and the sampler that draws the rest."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.data import levels_to_model
from ddpm_lightning.data.untrusted import read_array, read_picture, wrong_shape
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
    images = _of_option("--known", read_images, known, n, shape, levels)
    pixels = _of_option("--mask", read_mask, mask, n, shape)
    return Inpainting(images, pixels, factory or ReplacementSampler)


def _of_option(option: str, read: Callable[..., Tensor], path: str, *arguments: Any) -> Tensor:
    try:
        return read(Path(path).expanduser(), *arguments)
    except InputError as error:
        raise InputError(f"{option} {error}") from error


def read_images(path: Path, n: int, shape: tuple[int, ...], levels: int) -> Tensor:
    """Images that are known, for ``--known``: uint8 grey levels ``[1 or n, C, H, W]``.

    Args:
        path: a picture of one image, black to white; or a file of ``ddpm sample``, .safetensors or .npz, whose
            ``images`` are uint8 grey levels ``[1 or n, C, H, W]``.
        n: number of images that are drawn.
        shape: (C, H, W) that they must have.
        levels: number of grey levels.

    Raises:
        InputError: no such file, a damaged one, not of that shape, another number of images.
    """

    must = f"{path}: images must be uint8 grey levels 0..{levels - 1}, as ddpm sample writes them"

    def check(found: tuple[int, ...], dtype: str) -> None:
        if len(found) != 4 or found[1:] != tuple(shape):
            raise InputError(wrong_shape(path, found[1:], shape))
        if dtype != "uint8":
            raise InputError(f"{must}, not {dtype}")
        _check_count(path, found[0], n)

    if _is_array(path):
        images = read_array(path, "images", check)
    else:
        images = (read_picture(path, shape)[None].double() * ((levels - 1) / 255)).round().to(torch.uint8)
    if int(images.max()) >= levels:
        raise InputError(f"{must}, not up to {int(images.max())}")
    return images


def read_mask(path: Path, n: int, shape: tuple[int, ...]) -> Tensor:
    """Which pixels of n images of a shape (C, H, W) are known, for ``--mask``: bool ``[1 or n, C or 1, H, W]``.

    The file is a black and white picture, white where a pixel is known; or .safetensors or .npz with a bool ``mask``,
    ``[H, W]``, ``[C or 1, H, W]`` or ``[1 or n, C or 1, H, W]``.

    Raises:
        InputError: no such file, a damaged one, not of that size, grey pixels, another number of masks; no pixel is
            known, or all are.
    """

    def check(found: tuple[int, ...], dtype: str) -> None:
        whole = (1,) * (4 - len(found)) + found
        if dtype != "bool" or len(whole) != 4:
            must = "mask must be bool [height, width] or [n, channels or 1, height, width]"
            raise InputError(f"{path}: {must}, not {dtype} {list(found)}")
        if whole[2:] != tuple(shape[1:]) or whole[1] not in (1, shape[0]):
            raise InputError(wrong_shape(path, whole[1:], shape))
        _check_count(path, whole[0], n)

    if _is_array(path):
        mask = read_array(path, "mask", check)
    else:
        picture = read_picture(path, (1, *shape[1:]))
        mask = picture == 255
        if not bool((mask | (picture == 0)).all()):
            raise InputError(f"{path} must be black and white: white where a pixel is known")
    if bool(mask.all()) or not bool(mask.any()):
        which = "every pixel as known: nothing is left to draw" if bool(mask.all()) else "no pixel as known"
        raise InputError(f"{path} marks {which}; white or true stands for a known pixel")
    return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)


def _is_array(path: Path) -> bool:
    return path.suffix.lower() in (".safetensors", ".npz")


def _check_count(path: Path, found: int, n: int) -> None:
    if found not in (1, n):
        raise InputError(f"{path} is for {found} images: give one, or as many as --n, which is {n}")
