"""Exact values of lattice systems of finite size. All logarithms are nats."""

import math

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least, positive
from ddpm_lightning.lattice.sites import eigenvalues

__all__ = ["free_field_exact", "ising_exact", "phi4_ring_exact"]

_POINTS = 401  # of the transfer matrix
_NATS = 45.0  # the action at the ends of its range, above the least one: exp(-45) = 3e-20


def ising_exact(L: int, beta: float) -> dict[str, float]:
    r"""The Ising model on an L x L torus: :math:`E = -\sum_{<xy>} s_x s_y`, :math:`p \propto e^{-\beta E}`.

    With :math:`S = \sinh 2\beta` (Kaufman 1949, Phys. Rev. 76, 1232)

    .. math::

        Z &= \tfrac12 (2 S)^{N / 2} \Big[ \prod_r 2 \cosh \tfrac{L}{2} g_{2r+1} + \prod_r 2 \sinh \tfrac{L}{2} g_{2r+1}
            + \prod_r 2 \cosh \tfrac{L}{2} g_{2r} + \prod_r 2 \sinh \tfrac{L}{2} g_{2r} \Big] \\
        g_r &= 2 \operatorname{arsinh} \sqrt{\tfrac{(S - 1)^2}{2 S} + \sin^2 \tfrac{\pi r}{2 L}}, \quad
        g_0 = 2 \operatorname{arsinh} \tfrac{S - 1}{\sqrt{2 S}}

    with r = 0..L-1. Kaufman gives cosh g; the arsinh loses no digits where g is small. The logarithms of the products
    are summed, so L may be large. Derivatives by beta are torch's, in float64. They are exact at the critical point
    ln(1 + sqrt 2) / 2, too, where g_0 = 0. A difference to sums over all states is at most 1e-12.

    Args:
        L: sites of a side, 2 or more. On a side of two sites both bonds of a pair count.
        beta: inverse temperature, positive, at most 170.

    Returns:
        ``L``, ``beta``, ``logZ_per_spin``, ``energy_per_spin`` (mean of E / N), ``specific_heat_per_spin``
        (beta^2 Var(E) / N), ``entropy_nats_per_spin`` and ``bits_per_spin``, the entropy in bits: no model's code for
        the states is shorter in the mean.
    """
    at_least(2, L=L)
    positive(beta=beta)
    if beta > 170:
        raise InputError(f"beta = {beta:g} must be at most 170: all spins are equal there to every digit")
    N = L * L
    with torch.inference_mode(False), torch.enable_grad():
        b = torch.tensor(float(beta), dtype=torch.float64, requires_grad=True)
        log_z = _ising_log_z(L, b)
        (first,) = torch.autograd.grad(log_z, b, create_graph=True)
        (second,) = torch.autograd.grad(first, b)
    energy = -first.item() / N
    entropy = log_z.item() / N + beta * energy
    return {
        "L": L,
        "beta": beta,
        "logZ_per_spin": log_z.item() / N,
        "energy_per_spin": energy,
        "specific_heat_per_spin": beta**2 * second.item() / N,
        "entropy_nats_per_spin": entropy,
        "bits_per_spin": entropy / math.log(2),
    }


def _ising_log_z(L: int, b: Tensor) -> Tensor:
    S = torch.sinh(2 * b)
    # (S - 1)^2 / 2 S would overflow first
    x = (S - 1) / torch.sqrt(2 * S)
    r = torch.arange(1, 2 * L, dtype=torch.float64)
    g = 2 * torch.asinh(torch.sqrt(x.square() + torch.sin(math.pi / (2 * L) * r).square()))
    odd, even = g[0::2] * L / 2, g[1::2] * L / 2
    g0 = torch.asinh(x) * L
    # g_0 may be 0, and either sign: 2 sinh g_0 = sinh_0 exp(|g_0|), whichever sign 0 is given
    sign = 1.0 if g0.item() >= 0 else -1.0
    size0, sinh0 = sign * g0, -sign * torch.expm1(-2 * sign * g0)
    cosh = torch.stack([_log_2cosh(odd).sum(), _log_2cosh(even).sum() + size0 + torch.log1p(torch.exp(-2 * size0))])
    sinh = torch.stack([_log_2sinh(odd).sum(), _log_2sinh(even).sum() + size0])
    top = torch.cat([cosh, sinh]).max().detach()
    bracket = torch.exp(cosh - top).sum() + torch.exp(sinh[0] - top) + sinh0 * torch.exp(sinh[1] - top)
    return L * L / 2 * torch.log(2 * S) - math.log(2) + top + torch.log(bracket)


def _log_2cosh(x: Tensor) -> Tensor:
    return x + torch.log1p(torch.exp(-2 * x))


def _log_2sinh(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-2 * x))


def free_field_exact(L: int, dim: int, m2: float) -> dict[str, float]:
    r"""The free scalar field on a periodic lattice of :math:`N = L^{dim}` sites, :math:`p \propto e^{-S}`.

    .. math::

        S = \sum_x \Big[ \tfrac12 \sum_\mu (\phi(x + \mu) - \phi(x))^2 + \tfrac{m^2}{2} \phi(x)^2 \Big], \quad
        \log Z = \tfrac N2 \log 2 \pi - \tfrac12 \sum_k \log \lambda_k, \quad
        \lambda_k = m^2 + \sum_\mu (2 - 2 \cos k_\mu)

    Args:
        L: sites of a side.
        dim: number of space dimensions.
        m2: the squared mass in lattice units, positive.

    Returns:
        ``L``, ``dim``, ``m2``, ``logZ``, ``entropy_nats_per_site``, ``variance`` (of the field at one site) and
        ``neighbour_covariance``.
    """
    at_least(1, L=L, dim=dim)
    positive(m2=m2)
    k2 = eigenvalues((L,) * dim)
    N, spectrum = k2.numel(), 1 / (m2 + k2)
    log_z = 0.5 * N * math.log(2 * math.pi) + 0.5 * spectrum.log().sum().item()
    # the mean over the dimensions of cos k
    cosine = 1 - k2 / (2 * dim)
    return {
        "L": L,
        "dim": dim,
        "m2": m2,
        "logZ": log_z,
        "entropy_nats_per_site": log_z / N + 0.5,
        "variance": spectrum.mean().item(),
        "neighbour_covariance": (cosine * spectrum).mean().item(),
    }


def phi4_ring_exact(N: int, kappa: float, lam: float) -> dict[str, float]:
    r""":math:`\phi^4` in one dimension, a ring of N sites, by its transfer matrix.

    .. math::

        S = \sum_x \big[ -2 \kappa \phi_x \phi_{x+1} + V(\phi_x) \big], \quad V(x) = (1 - 2 \lambda) x^2 + \lambda x^4,
        \quad T(a, b) = e^{2 \kappa a b - V(a) / 2 - V(b) / 2}, \quad Z = \mathrm{tr}\, T^N

    The integral is the trapezoidal rule with 401 points. It converges exponentially for such integrands (Trefethen and
    Weideman 2014, SIAM Review 56, 385): with 801 points the values are the same to 1e-11 for lambda up to 10.

    Args:
        N: number of sites, 2 or more.
        kappa: hopping parameter.
        lam: coupling, at least 0. At 0 the field is free, and \|kappa\| must be below 1/2.

    Returns:
        ``N``, ``kappa``, ``lam``, ``logZ``, ``phi2`` (mean of phi^2), ``phi4`` (of phi^4), ``nn`` (of phi_0 phi_1),
        ``susceptibility`` (sum of <phi_0 phi_d> over all d) and ``entropy_nats_per_site``.
    """
    at_least(2, N=N)
    x = _phi4_grid(kappa, lam)
    v = (1 - 2 * lam) * x.square() + lam * x.pow(4)
    log_t = 2 * kappa * x[:, None] * x - 0.5 * (v[:, None] + v)
    top = log_t.max()
    values, vectors = torch.linalg.eigh(torch.exp(log_t - top))
    largest = values.max()  # in size too, since all entries of T are positive
    ratios = values / largest
    kept = ratios.abs() > 1e-16
    ratios, vectors = ratios[kept], vectors[:, kept]
    powers = ratios.pow(N)
    weights = powers / powers.sum()
    x2 = vectors.T @ (x[:, None] * vectors)
    x2 = x2.square()
    phi2 = (weights @ (x.square() @ vectors.square())).item()
    phi4 = (weights @ (x.pow(4) @ vectors.square())).item()
    correlations = [
        (ratios.pow(N - d) @ x2 @ ratios.pow(d) / powers.sum()).item()
        for d in range(1, N // 2 + 1)  # <phi_0 phi_d> = <phi_0 phi_(N-d)>
    ]
    log_z = N * (top + torch.log((x[1] - x[0]) * largest)).item() + powers.sum().log().item()
    mean_action = -2 * kappa * correlations[0] + (1 - 2 * lam) * phi2 + lam * phi4
    twice = correlations if N % 2 else correlations[:-1]
    return {
        "N": N,
        "kappa": kappa,
        "lam": lam,
        "logZ": log_z,
        "phi2": phi2,
        "phi4": phi4,
        "nn": correlations[0],
        "susceptibility": phi2 + sum(correlations) + sum(twice),
        "entropy_nats_per_site": log_z / N + mean_action,
    }


def _phi4_grid(kappa: float, lam: float) -> Tensor:
    """Equidistant points, out to where the action of a site and half of its bonds is ``_NATS`` above its least."""
    if not (math.isfinite(kappa) and abs(kappa) < 100):
        raise InputError(f"kappa = {kappa:g} must lie between -100 and 100")
    if not 0 <= lam <= 1000:
        raise InputError(f"lam = {lam:g} must lie between 0 and 1000")
    mass = 1 - 2 * lam - 2 * abs(kappa)
    if lam == 0 and mass <= 0:
        raise InputError(
            f"kappa = {kappa:g} must lie between -1/2 and 1/2 at lam = 0: there is no lowest action beyond"
        )
    # mass x^2 + lam x^4 = least + _NATS, for x^2
    if lam == 0:
        squared = _NATS / mass
    else:
        least = -(mass**2) / (4 * lam) if mass < 0 else 0.0
        squared = 2 * (_NATS + least) / (mass + math.sqrt(mass**2 + 4 * lam * (_NATS + least)))
    return torch.linspace(-1, 1, _POINTS, dtype=torch.float64) * math.sqrt(squared)
