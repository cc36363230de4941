r"""Observables of samples, with errors.

These arguments mean the same in all functions::

    phi      samples [n, 1, *space]
    weights  [n], not negative, of any scale, for reweighted means; None for equal ones
    block    consecutive samples of a block whose correlation the error takes into account; of chains one after the
             other the samples of one chain. See :func:`~ddpm_lightning.lattice.jackknife`

:math:`m = \frac1N \sum_x \phi(x)` is the magnetisation of a configuration.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lightning.errors import positive
from ddpm_lightning.lattice.actions import Action
from ddpm_lightning.lattice.errors import Estimate, jackknife, leave_one_out, spread
from ddpm_lightning.lattice.sites import bond_sum, check_fields, eigenvalues, site_sum

__all__ = [
    "Spectrum",
    "binder_cumulant",
    "energy",
    "magnetisation",
    "mean_action",
    "mean_square",
    "neighbour_product",
    "power_spectrum",
    "specific_heat",
    "susceptibility",
]

_CHUNK = 4096  # configurations that are transformed at once


def energy(phi: Tensor, weights: Tensor | None = None, block: int = 1) -> Estimate:
    r"""Ising energy per site, :math:`-\frac1N \sum_x \sum_\mu s_x s_{x + \mu}`."""
    return _mean(-_bonds_per_site(phi), weights, block)


def specific_heat(phi: Tensor, beta: float, weights: Tensor | None = None, block: int = 1) -> Estimate:
    r"""Ising specific heat per site, :math:`\beta^2 N (\langle e^2 \rangle - \langle e \rangle^2)`, e the energy per
    site, at the inverse temperature ``beta``."""
    positive(beta=beta)
    e = _bonds_per_site(phi)
    scale = beta**2 * _sites(phi)
    return jackknife(lambda m: scale * (m[..., 1] - m[..., 0].square()), _powers(e, 1, 2), weights, block)


def mean_action(phi: Tensor, action: Action, weights: Tensor | None = None, block: int = 1) -> Estimate:
    """Action per site."""
    return _mean(action(phi) / _sites(phi), weights, block)


def magnetisation(phi: Tensor, weights: Tensor | None = None, block: int = 1) -> Estimate:
    r""":math:`\langle |m| \rangle`."""
    return _mean(_m(phi).abs(), weights, block)


def susceptibility(phi: Tensor, weights: Tensor | None = None, block: int = 1, connected: bool = False) -> Estimate:
    r""":math:`N \langle m^2 \rangle = \sum_d \langle \phi(0) \phi(d) \rangle`; connected:
    :math:`N (\langle m^2 \rangle - \langle |m| \rangle^2)`."""
    N = _sites(phi)
    if not connected:
        return _mean(N * _m(phi).square(), weights, block)
    return jackknife(lambda m: N * (m[..., 1] - m[..., 0].square()), _powers(_m(phi).abs(), 1, 2), weights, block)


def binder_cumulant(phi: Tensor, weights: Tensor | None = None, block: int = 1) -> Estimate:
    r""":math:`1 - \langle m^4 \rangle / (3 \langle m^2 \rangle^2)`: 0 of a Gaussian m, 2/3 of :math:`m = \pm 1`
    (Binder 1981, Z. Phys. B 43, 119)."""
    return jackknife(lambda m: 1 - m[..., 1] / (3 * m[..., 0].square()), _powers(_m(phi), 2, 4), weights, block)


def mean_square(phi: Tensor, weights: Tensor | None = None, block: int = 1) -> Estimate:
    r""":math:`\langle \phi^2 \rangle` of a site."""
    return _mean(site_sum(check_fields(phi).square()) / _sites(phi), weights, block)


def neighbour_product(phi: Tensor, weights: Tensor | None = None, block: int = 1) -> Estimate:
    r""":math:`\langle \phi(x) \phi(x + \mu) \rangle`, the mean over all bonds."""
    return _mean(_bonds_per_site(phi) / (phi.ndim - 2), weights, block)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Mean power of the modes of a field; all float64 ``[K]``."""

    k2: Tensor
    r""":math:`\hat k^2 = \sum_\mu 4 \sin^2(k_\mu / 2)`, rising."""
    mean: Tensor
    se: Tensor
    modes: Tensor
    """How many modes have this k2."""


def power_spectrum(phi: Tensor, weights: Tensor | None = None, block: int = 1) -> Spectrum:
    r""":math:`\langle |\phi_k|^2 \rangle` with :math:`\phi_k = N^{-1/2} \sum_x e^{-ikx} \phi(x)`, as a mean over the
    modes of equal :math:`\hat k^2`.

    At k = 0 it is the susceptibility; of the free field it is :math:`1 / (m^2 + \hat k^2)`. Its mean over all modes is
    the mean square of a site. A mode and its mirror image have the same power, so half of the modes are independent.
    """
    space = tuple(check_fields(phi).shape[2:])
    k2 = eigenvalues(space).flatten()
    values, shell = torch.unique((k2 * 1e9).round(), return_inverse=True)
    shell = shell.to(phi.device)
    count = torch.bincount(shell)
    power = torch.cat([_shells(part, shell, len(values)) for part in phi.split(_CHUNK)])
    mean, parts = leave_one_out(power / count, weights, block)
    return Spectrum(values.to(phi.device) / 1e9, mean, spread(parts), count)


def _shells(phi: Tensor, shell: Tensor, shells: int) -> Tensor:
    """Power summed over the modes of each shell, ``[n, shells]``."""
    dims = tuple(range(2, phi.ndim))
    power = torch.fft.fftn(phi.double(), dim=dims, norm="ortho").abs().square().flatten(1)
    return power.new_zeros(len(phi), shells).index_add_(1, shell, power)


def _sites(phi: Tensor) -> int:
    return check_fields(phi)[0].numel()


def _m(phi: Tensor) -> Tensor:
    return site_sum(check_fields(phi)) / _sites(phi)


def _bonds_per_site(phi: Tensor) -> Tensor:
    return bond_sum(check_fields(phi)) / _sites(phi)


def _powers(values: Tensor, *exponents: int) -> Tensor:
    return torch.stack([values.pow(exponent) for exponent in exponents], 1)


def _mean(values: Tensor, weights: Tensor | None, block: int) -> Estimate:
    return jackknife(lambda means: means[..., 0], values[:, None], weights, block)
