r"""Samples of lattice systems, by algorithms whose limit is exact. Everything is a function of an integer seed.

Many chains are simulated side by side, as one tensor. The chains start independently of each other, at a random
configuration of independent sites (a hot start), and the first updates are thrown away.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least, positive
from ddpm_lightning.lattice.actions import Action, Phi4Action
from ddpm_lightning.lattice.errors import Estimate, integrated_autocorrelation_time
from ddpm_lightning.lattice.sites import eigenvalues, site_sum

__all__ = ["Chains", "simulate_free_field", "simulate_ising", "simulate_phi4"]

_ENOUGH = 50  # trajectories, one of which a chain accepts unless something is wrong


@dataclass(frozen=True, eq=False)
class Chains:
    """Samples of independent Markov chains."""

    fields: Tensor
    """float32 ``[chains * samples, 1, *space]``, chain by chain."""
    chains: int
    updates: int
    """Updates of a chain from one sample to the next."""
    acceptance: float
    """The part of the updates that was accepted."""
    autocorrelation_time: Estimate
    """Integrated, of the size of the magnetisation, in updates. nan where the chains are too short to tell."""

    @property
    def block(self) -> int:
        """Samples of a chain: the ``block`` of observables, for errors that know of the correlation."""
        return len(self.fields) // self.chains

    @property
    def interleaved(self) -> Tensor:
        """The fields, the first samples of all chains first: neighbours in this order are independent."""
        return self.fields.unflatten(0, (self.chains, self.block)).transpose(0, 1).flatten(0, 1)


def simulate_free_field(L: int, dim: int, m2: float, count: int, *, seed: int = 0) -> Chains:
    r"""Independent samples of the free field: white noise, each mode divided by :math:`\sqrt{\lambda_k}`.

    See :func:`~ddpm_lightning.lattice.free_field_exact` for the arguments. ``count`` samples, each a chain of its own.
    """
    at_least(1, L=L, dim=dim, count=count)
    positive(m2=m2)
    space = (L,) * dim
    noise = torch.randn(count, 1, *space, generator=_generator(seed))
    dims = tuple(range(2, dim + 2))
    # real noise needs half of the modes only
    scale = (m2 + eigenvalues(space)[..., : L // 2 + 1]).rsqrt().float()
    fields = torch.fft.irfftn(torch.fft.rfftn(noise, dim=dims) * scale, s=space, dim=dims)
    return Chains(fields, count, 1, 1.0, Estimate(0.5, 0.0))


def simulate_phi4(
    L: int,
    dim: int,
    kappa: float,
    lam: float,
    samples: int,
    *,
    chains: int = 256,
    updates: int = 10,
    warm_up: int = 300,
    length: float = 6.0,
    steps: int = 24,
    seed: int = 0,
) -> Chains:
    r""":math:`\phi^4` on a periodic lattice of L^dim sites, by hybrid Monte Carlo.

    (Duane, Kennedy, Pendleton and Roweth 1987, Phys. Lett. B 195, 216.)

    An update is a trajectory of leapfrog steps with fresh momenta, accepted or rejected as a whole. The step of each
    chain and trajectory is drawn within a fifth of length / steps, since a fixed one may meet a period of the motion
    (Mackenzie 1989, Phys. Lett. B 226, 369). Then the sign of the whole field is drawn, which the action does not see.

    Args:
        L: sites of a side.
        dim: number of space dimensions.
        kappa: hopping parameter.
        lam: coupling, positive.
        samples: of each chain.
        chains: number of chains.
        updates: from one sample to the next.
        warm_up: updates before the first sample.
        length: of a trajectory in its own time.
        steps: of a trajectory.
        seed: 0 or more.

    Raises:
        InputError: a chain never moved, so its samples mean nothing.
    """
    at_least(1, L=L, dim=dim, samples=samples, chains=chains, updates=updates, steps=steps)
    at_least(0, warm_up=warm_up)
    positive(length=length)
    generator, action = _generator(seed), Phi4Action(kappa, lam)
    # not wider: far out in the quartic wall leapfrog steps are unstable, and a chain would stay there
    phi = 2 * torch.rand(chains, 1, *(L,) * dim, generator=generator) - 1
    recorder, accepted = _Recorder(phi, samples, updates), torch.zeros(chains, dtype=torch.int64)
    total = samples * updates
    # where few samples are wanted, the end of the warm-up tells whether the chains move
    watched, moved = min(max(total, _ENOUGH), warm_up + total), torch.zeros(chains, dtype=torch.bool)
    with torch.no_grad():
        for number in range(warm_up + total):
            phi, accept = _trajectory(phi, action, length, steps, generator)
            phi = phi * _signs((chains, *(1,) * (phi.ndim - 1)), generator)
            if number >= warm_up + total - watched:
                moved |= accept
            if number >= warm_up:
                accepted += accept
                recorder.add(phi)
    if watched >= _ENOUGH and (stuck := int((~moved).sum())):
        raise InputError(
            f"steps = {steps} of a trajectory of length {length:g} are too few: {stuck} of {chains} chains accepted"
            f" none of {watched} trajectories; give more steps or a shorter length"
        )
    return recorder.chains(accepted.double().mean().item() / total)


def _trajectory(
    phi: Tensor, action: Action, length: float, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """New fields, and which chains accepted theirs, bool ``[chains]``."""
    each = (len(phi), *(1,) * (phi.ndim - 1))
    step = length / steps * (0.8 + 0.4 * torch.rand(each, generator=generator))
    momentum = torch.randn(phi.shape, generator=generator)
    before = action(phi) + 0.5 * site_sum(momentum.square())
    new = phi.clone()
    momentum.addcmul_(step, action.gradient(new), value=-0.5)
    for number in range(steps):
        new.addcmul_(step, momentum)
        momentum.addcmul_(step, action.gradient(new), value=-0.5 if number == steps - 1 else -1.0)
    after = action(new) + 0.5 * site_sum(momentum.square())
    accept = torch.rand(len(phi), generator=generator, dtype=torch.float64) < torch.exp(before - after)
    return torch.where(accept.reshape(each), new, phi), accept


def simulate_ising(
    L: int,
    beta: float,
    samples: int,
    *,
    chains: int = 256,
    updates: int = 10,
    warm_up: int = 100,
    seed: int = 0,
) -> Chains:
    r"""The Ising model on an L x L torus, by the cluster algorithm of Swendsen and Wang.

    (1987, Phys. Rev. Lett. 58, 86.) An update joins equal neighbours with the probability :math:`1 - e^{-2 \beta}` and
    draws the sign of each cluster. It hardly slows down at the critical point, like Wolff's, which flips one such
    cluster. Unlike Wolff's it does the same work in all chains, so they go side by side.

    Args:
        L: sites of a side, 2 or more.
        beta: inverse temperature, positive.
        samples: of each chain.
        chains: number of chains.
        updates: from one sample to the next.
        warm_up: updates before the first sample.
        seed: 0 or more.
    """
    at_least(2, L=L)
    at_least(1, samples=samples, chains=chains, updates=updates)
    at_least(0, warm_up=warm_up)
    positive(beta=beta)
    generator = _generator(seed)
    joined = -math.expm1(-2 * beta)
    sites = torch.arange(chains * L * L).reshape(chains, L, L)
    nexts = [sites.roll(-1, dim) for dim in (1, 2)]
    spins = _signs(sites.shape, generator)
    recorder = _Recorder(spins[:, None].float(), samples, updates)
    for number in range(warm_up + samples * updates):
        bonds = [
            (spins == spins.roll(-1, dim)) & (torch.rand(sites.shape, generator=generator) < joined) for dim in (1, 2)
        ]
        spins = _signs(sites.shape, generator).flatten()[_clusters(bonds, sites, nexts)]
        if number >= warm_up:
            recorder.add(spins[:, None].float())
    return recorder.chains(1.0)


def _clusters(bonds: list[Tensor], sites: Tensor, nexts: list[Tensor]) -> Tensor:
    """The least site of the cluster of each site, of the shape of ``sites``, for all chains at once.

    Labels form trees that lead to smaller sites. Of two roots that a bond joins, the larger is hung under the smaller,
    then every site is led to its root, until no bond joins two (after Shiloach and Vishkin 1982, J. Algorithms 3, 57).
    Where several bonds hang one root, any of them may win: the last root is the least site in any case.
    """
    labels = sites.flatten().clone()
    a = torch.cat([sites[bond] for bond in bonds])
    b = torch.cat([after[bond] for after, bond in zip(nexts, bonds, strict=True)])
    while len(a):
        labels[torch.maximum(a, b)] = torch.minimum(a, b)
        while not torch.equal(roots := labels[labels], labels):
            labels = roots
        a, b = labels[a], labels[b]
        apart = (a != b).nonzero().squeeze(1)
        a, b = a[apart], b[apart]
    return labels.reshape(sites.shape)


class _Recorder:
    """Keeps every so many updates' fields, and the magnetisation of all."""

    def __init__(self, phi: Tensor, samples: int, updates: int) -> None:
        self._fields = phi.new_empty(len(phi), samples, *phi.shape[1:])
        self._series = phi.new_empty(len(phi), samples * updates, dtype=torch.float64)
        self._updates, self._seen = updates, 0

    def add(self, phi: Tensor) -> None:
        self._series[:, self._seen] = site_sum(phi).abs()
        self._seen += 1
        if self._seen % self._updates == 0:
            self._fields[:, self._seen // self._updates - 1] = phi

    def chains(self, acceptance: float) -> Chains:
        short = self._series.shape[1] < 2
        time = Estimate(math.nan, math.nan) if short else integrated_autocorrelation_time(self._series)
        return Chains(self._fields.flatten(0, 1), len(self._fields), self._updates, acceptance, time)


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """-1 or 1, int8."""
    return 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8) - 1


def _generator(seed: int) -> torch.Generator:
    if not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed} must lie between 0 and {2**32 - 1}: torch tells no other seeds apart")
    return torch.Generator().manual_seed(seed)
