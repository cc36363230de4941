"""Sums over the sites and the neighbours of a periodic lattice."""

import math

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = ["bond_sum", "check_fields", "eigenvalues", "neighbour_sum", "site_sum"]


def check_fields(phi: Tensor) -> Tensor:
    """``phi``, if it has the shape ``[B, 1, *space]``, or InputError."""
    if phi.ndim < 3 or phi.shape[1] != 1 or not phi.is_floating_point():
        raise InputError(
            f"phi of shape {list(phi.shape)} and {phi.dtype} is no batch of configurations: give floating-point numbers"
            " of shape [B, 1, *space], with one or more space dimensions"
        )
    return phi


def site_sum(values: Tensor) -> Tensor:
    """Sum over the lattice, float64: ``[B, 1, *space]`` -> ``[B]``."""
    return values.flatten(1).sum(1, dtype=torch.float64)


def bond_sum(phi: Tensor) -> Tensor:
    r""":math:`\sum_x \sum_\mu \phi(x) \phi(x + \mu)`, float64: ``[B, 1, *space]`` -> ``[B]``.

    On a side of two sites both bonds of a pair count."""
    return site_sum(phi * sum(phi.roll(-1, dim) for dim in range(2, phi.ndim)))


def neighbour_sum(phi: Tensor) -> Tensor:
    r""":math:`\sum_\mu [\phi(x + \mu) + \phi(x - \mu)]` at each site, of the shape of ``phi``."""
    total = torch.zeros_like(phi)
    for dim in range(2, phi.ndim):
        total += phi.roll(1, dim)
        total += phi.roll(-1, dim)
    return total


def eigenvalues(shape: tuple[int, ...]) -> Tensor:
    r"""Eigenvalues of the lattice Laplacian with the sign reversed, float64 of shape ``shape``.

    :math:`\hat k^2 = \sum_\mu 4 \sin^2(k_\mu / 2)`, :math:`k_\mu = 2 \pi n_\mu / L_\mu`, in the order of
    ``torch.fft.fftn``.
    """
    total = torch.zeros(shape, dtype=torch.float64)
    for dim, length in enumerate(shape):
        side = 4 * torch.sin(math.pi / length * torch.arange(length, dtype=torch.float64)).square()
        total += side.reshape(-1, *(1,) * (len(shape) - dim - 1))
    return total
