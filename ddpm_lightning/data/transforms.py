"""Grey levels 0..levels-1 (2..256 levels) to model range [-1, 1] and back: level k sits at 2 k / (levels - 1) - 1."""

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = ["check_grey_levels", "levels_to_model", "model_to_levels"]


def levels_to_model(images: Tensor, levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Grey levels, uint8 ``[...]`` in 0..levels-1, to model range; ``model_to_levels`` undoes it bit for bit.

    Each value is the closest that ``dtype`` has to 2 k / (levels - 1) - 1. A half-precision type cannot tell 256 levels
    apart.

    Raises:
        InputError: images that are not uint8.
    """
    _check_levels(levels)
    _check_type(images, "levels_to_model", f"0..{levels - 1}")
    # 2k - (levels - 1) is a whole number, so the division is the only rounding. Its divisor is a tensor on the
    # device because CUDA turns the division by a Python number into a product with a rounded reciprocal.
    top = torch.full((), levels - 1, dtype=dtype, device=images.device)
    return images.to(dtype).mul_(2).sub_(top).div_(top)


def model_to_levels(x: Tensor, levels: int) -> Tensor:
    """Finite numbers ``[...]`` in model range to the nearest grey level, uint8 in 0..levels-1, ends beyond [-1, 1]."""
    _check_levels(levels)
    if x.dtype != torch.float64:
        x = x.float()
    return x.add(1).mul_((levels - 1) / 2).round_().clamp_(0, levels - 1).to(torch.uint8)


def check_grey_levels(images: Tensor, levels: int, source: str) -> None:
    """Refuse, with an InputError, images that are not uint8 in 0..levels-1; ``source`` is where they come from."""
    _check_type(images, source, f"0..{levels - 1}")
    if len(images) and int(images.max()) >= levels:
        raise InputError(f"{source} has grey levels up to {int(images.max())}: they must lie in 0..{levels - 1}")


def _check_type(images: Tensor, source: str, range_: str) -> None:
    if images.dtype == torch.uint8:
        return
    values = ""
    if images.numel() and not images.is_complex():
        values = f" from {images.min().item():g} to {images.max().item():g}"
    remedy = "use torchvision's PILToTensor instead of ToTensor, and no Normalize"
    if not images.is_floating_point():
        remedy = "convert them with .to(torch.uint8)"
    raise InputError(
        f"{source} has images {str(images.dtype).removeprefix('torch.')}{values}: give uint8 grey levels {range_}, "
        f"which are brought into [-1, 1] here ({remedy})"
    )


def _check_levels(levels: int) -> None:
    if not 2 <= levels <= 256:
        raise InputError(f"levels = {levels} must lie between 2 and 256: images are stored as uint8 grey levels")
