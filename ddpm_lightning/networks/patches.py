"""Pixels of small patches as channels, and back, in 1 to 3 dimensions (Hoogeboom et al. 2023, arXiv 2301.11093)."""

from torch import Tensor

__all__ = ["from_patches", "to_patches"]


def to_patches(x: Tensor, side: int) -> Tensor:
    """``[B, C, *space]`` to ``[B, C side**d, *space / side]`` in d dimensions; ``side`` divides each size."""
    if side == 1:
        return x  # in its own memory format
    dims = x.ndim - 2
    for axis in range(dims):
        x = x.unflatten(2 + 2 * axis, (-1, side))
    return x.permute(0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2)).flatten(1, 1 + dims)


def from_patches(x: Tensor, side: int) -> Tensor:
    """The inverse of :func:`to_patches`: ``[B, C side**d, *space]`` to ``[B, C, *space side]``."""
    if side == 1:
        return x
    dims = x.ndim - 2
    space = [side * size for size in x.shape[2:]]
    x = x.unflatten(1, (-1, *(side,) * dims))
    x = x.permute(0, 1, *(axis + place for axis in range(2, 2 + dims) for place in (dims, 0)))
    return x.reshape(*x.shape[:2], *space)
