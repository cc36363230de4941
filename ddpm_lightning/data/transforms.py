r"""Between the values of the data and those that a model sees.

Grey levels 0..levels-1 (2..256 levels) lie in [-1, 1]: level k sits at 2 k / (levels - 1) - 1. Fields are standardised,
(x - mean) / std for each channel.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = [
    "GreyLevels",
    "Scale",
    "Standardized",
    "check_grey_levels",
    "levels_to_model",
    "model_to_levels",
    "scale_of",
]


class Scale:
    """Base of the maps between the data's values and model range."""

    levels: int | None
    """Number of grey levels; None for real numbers."""

    def to_model(self, data: Tensor) -> Tensor:
        """Values of the data ``[B, C, *space]`` as the model sees them, float32."""
        raise NotImplementedError

    def to_data(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`to_model`."""
        raise NotImplementedError

    def density_nats(self, shape: Sequence[int]) -> float:
        """What to add to the log density that a model gives to its own values, to have that of data of ``shape``
        (C, *space) in their own units, in nats. Of grey levels it is that in units of one level.
        """
        raise NotImplementedError


class GreyLevels(Scale):
    """Grey levels, uint8, and model range [-1, 1].

    Args:
        levels: number of grey levels, 2..256.
    """

    levels: int

    def __init__(self, levels: int) -> None:
        _check_levels(levels)
        self.levels = levels

    def to_model(self, data: Tensor) -> Tensor:
        return levels_to_model(data, self.levels)

    def to_data(self, x: Tensor) -> Tensor:
        return model_to_levels(x, self.levels)

    def density_nats(self, shape: Sequence[int]) -> float:
        return -math.prod(shape) * math.log((self.levels - 1) / 2)


class Standardized(Scale):
    """Real numbers, and the same with mean 0 and standard deviation 1 in each channel.

    Args:
        mean: of each channel, in the units of the data.
        std: of each channel, positive.
    """

    levels = None

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or not all(0 < value < math.inf for value in std):
            raise InputError(f"std = {list(std)} must be a positive number for each of the {len(mean)} channels")
        self.mean, self.std = [float(value) for value in mean], [float(value) for value in std]

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, *(1,) * (like.ndim - 2))
        mean, std = (torch.tensor(values, dtype=torch.float64).reshape(shape) for values in (self.mean, self.std))
        return mean.to(like.device), std.to(like.device)

    def to_model(self, data: Tensor) -> Tensor:
        mean, std = self._columns(data)
        return ((data.double() - mean) / std).float()

    def to_data(self, x: Tensor) -> Tensor:
        """In float64 inside and float32 outside, as the files hold it."""
        mean, std = self._columns(x)
        return (x.double() * std + mean).float()

    def density_nats(self, shape: Sequence[int]) -> float:
        return -math.prod(shape[1:]) * sum(math.log(value) for value in self.std)


def scale_of(levels: int | None, standard: Mapping[str, Sequence[float]] | None) -> Scale:
    """The scale of grey levels, or of fields with ``mean`` and ``std`` of each channel.

    Raises:
        InputError: both or neither are given.
    """
    if standard is not None and levels is None:
        return Standardized(standard["mean"], standard["std"])
    if levels is None or standard is not None:
        raise InputError("data have either levels, a number of grey levels, or scale, the mean and std of fields")
    return GreyLevels(levels)


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
