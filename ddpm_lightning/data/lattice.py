"""Lattice systems as data: simulated on first use, and kept in a file."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.data.batches import Split
from ddpm_lightning.data.cache import kept
from ddpm_lightning.data.datamodule import ArrayDataModule, ImageDataModule, SplitName
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.lattice import (
    Action,
    Chains,
    Estimate,
    FreeFieldAction,
    IsingAction,
    Phi4Action,
    binder_cumulant,
    energy,
    free_field_exact,
    ising_exact,
    magnetisation,
    mean_square,
    neighbour_product,
    phi4_ring_exact,
    simulate_free_field,
    simulate_ising,
    simulate_phi4,
    susceptibility,
)

__all__ = ["FreeField", "Ising", "LatticeSystem", "Phi4", "SimulatedLattice", "by_chain"]

_SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
# Not options: results of different runs are comparable only on the same data. A change of them, or of the simulators,
# is a new version, whose files have other names.
_VERSION = 1
_CHAINS = 256


def by_chain(phi: Tensor) -> tuple[Tensor, int]:
    """Configurations of a split, of one coupling, as one Markov chain after the other, and how many each has left.

    This is the ``block`` of observables, for errors that know of the correlation within a chain. The last
    configurations are left out where the chains are not of equal length.
    """
    chains = min(_CHAINS, len(phi))
    block = len(phi) // chains
    return phi[: chains * block].unflatten(0, (block, chains)).transpose(0, 1).flatten(0, 1), block


@runtime_checkable
class LatticeSystem(Protocol):
    """What is known of the distribution of the data, and how its samples are looked at."""

    couplings: list[float]
    """The values of the parameter that the data may be conditioned on; one where they are not."""

    def configurations(self, data: Tensor) -> Tensor:
        """Data as they lie in a batch, as configurations ``[B, 1, *space]`` of the physical field."""

    def action(self, coupling: float) -> Action:
        """S, with p ~ exp(-S)."""

    def exact(self, coupling: float) -> dict[str, float]:
        """Known values by the names of :meth:`observables`, and ``log_Z``; empty where there are none."""

    def observables(self, phi: Tensor, weights: Tensor | None = None, block: int = 1) -> dict[str, Estimate]:
        """By name, of configurations, per site where they grow with the lattice."""


class SimulatedLattice(ArrayDataModule):
    """A lattice system that is simulated on first use and kept in the folder ``lattice`` of ``root``.

    A subclass names its coupling, which it has before this class looks at it, and says what the action is and how it is
    simulated. With a list of couplings the splits hold them in equal shares, and each configuration has its own as the
    condition ``vector``. The splits come from independent seeds.

    Args:
        L: sites of a side, 2 or more.
        n_train: number of training configurations.
        n_val: number of configurations for validation.
        n_test: number of configurations for tests.
        root: folder for the simulated configurations.
        simulation_seed: another one is another draw of all three splits. ``seed`` is the order of the training data.
        options: as of :class:`~ddpm_lightning.data.datamodule.ArrayDataModule`.

    Raises:
        InputError: couplings that have no distribution, or another argument outside of its range.
    """

    parameter: str
    """The name of the coupling."""
    dim: int
    """Dimensions, 1 to 3."""
    dtype: np.dtype[Any] = np.dtype(np.float32)

    def __init__(
        self,
        L: int = 16,
        n_train: int = 20_000,
        n_val: int = 2_000,
        n_test: int = 10_000,
        root: str = "data",
        simulation_seed: int = 0,
        **options: Any,
    ) -> None:
        at_least(2, L=L)
        at_least(1, n_train=n_train, n_val=n_val, n_test=n_test)
        at_least(0, simulation_seed=simulation_seed)
        if not 1 <= self.dim <= 3:
            raise InputError(f"dim = {self.dim} must be 1, 2 or 3")
        coupling: float | list[float] = getattr(self, self.parameter)
        self.couplings = list(coupling) if isinstance(coupling, list) else [coupling]
        if not self.couplings:
            raise InputError(f"--data.{self.parameter} []: a list of couplings must hold one at least")
        for each in self.couplings:
            self.action(each)  # refuses what makes no sense
        super().__init__({"train": n_train, "val": n_val, "test": n_test}, **options)
        self.L, self.root, self.simulation_seed = L, root, simulation_seed
        self.shape = (1, *(L,) * self.dim)
        self.vector_size = 1 if isinstance(coupling, list) else None

    def action(self, coupling: float) -> Action:
        raise NotImplementedError

    def simulate(self, coupling: float, count: int, seed: int) -> Chains:
        """``count`` configurations or more, in chains of equal length."""
        raise NotImplementedError

    def file_name(self, coupling: float) -> str:
        """The beginning of a file's name: all that the distribution depends on."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Simulate the splits that are not there; InputError where they cannot be kept."""
        for name in _SPLITS:
            self.split(name)

    def _kept(self, split: SplitName, coupling: float, count: int) -> Tensor:
        name = f"{self.file_name(coupling)}-{split}-n{count}-seed{self.simulation_seed}-v{_VERSION}.npy"
        # hashed, so that no split of one seed is one of another seed
        seeds = np.random.SeedSequence(self.simulation_seed, spawn_key=(_SPLITS.index(split),))

        def simulated() -> np.ndarray:
            # neighbours are samples of different chains, so the first so many of a split are independent, too
            phi = self.simulate(coupling, count, int(seeds.generate_state(1)[0])).interleaved[:count]
            if not bool(phi.isfinite().all() & phi.any()):
                raise InputError(f"{self.parameter} = {coupling:g} leads to fields that float32 cannot hold")
            return self._stored(phi).numpy()

        path = Path(self.root).expanduser() / "lattice" / name
        return torch.from_numpy(kept(path, (count, *self.shape), self.dtype, simulated))

    def _stored(self, phi: Tensor) -> Tensor:
        """Configurations as they lie in the file."""
        return phi


class Ising(SimulatedLattice, ImageDataModule):
    """The Ising model on an L x L torus: one channel, two grey levels, 0 for spin -1 and 1 for spin 1, one class.

    The entropy of these data is exact, ``ising_exact(L, beta)["bits_per_spin"]``: what a model's bits/dim lie above it
    is the divergence of the data from the model. The splits are simulated by a cluster algorithm (20,000 configurations
    of 16 x 16 take about 10 seconds of a CPU core).

    Args:
        L: sites of a side, 2 or more.
        beta: inverse temperature, positive; the critical one of a large lattice is ln(1 + sqrt 2) / 2 = 0.4407.
        options: n_train, root and the other arguments of :class:`SimulatedLattice`.
    """

    parameter, dim, dtype = "beta", 2, np.dtype(np.uint8)
    levels = 2
    num_classes = 1

    def __init__(self, L: int = 16, beta: float = 0.44, **options: Any) -> None:
        self.beta = beta
        super().__init__(L, **options)

    def configurations(self, data: Tensor) -> Tensor:
        """Spins -1 and 1, float32."""
        return 2.0 * data.float() - 1

    def action(self, coupling: float) -> IsingAction:
        return IsingAction(coupling)

    def exact(self, coupling: float) -> dict[str, float]:
        known = ising_exact(self.L, coupling)
        return {"energy": known["energy_per_spin"], "log_Z": known["logZ_per_spin"] * self.L**2}

    def observables(self, phi: Tensor, weights: Tensor | None = None, block: int = 1) -> dict[str, Estimate]:
        return {"energy": energy(phi, weights, block), **_magnetic(phi, weights, block)}

    def load(self, split: SplitName) -> Split:
        images = self._kept(split, self.beta, self.sizes[split])
        return Split(images, torch.zeros(len(images), dtype=torch.int64))

    def simulate(self, coupling: float, count: int, seed: int) -> Chains:
        return simulate_ising(self.L, coupling, **_chains(count), seed=seed)

    def file_name(self, coupling: float) -> str:
        return f"ising-L{self.L}-beta{float(coupling)!r}"

    def _stored(self, phi: Tensor) -> Tensor:
        return (phi > 0).byte()


class _Fields(SimulatedLattice):
    """Real fields, for one coupling or several."""

    levels = None
    num_classes = None

    @cached_property
    def scale(self) -> Mapping[str, Sequence[float]]:  # type: ignore[override]  # measured on first use
        """Mean 0, by symmetry, and the standard deviation of a site in the training split."""
        return {"mean": [0.0], "std": [float(self.split("train").images.double().square().mean().sqrt())]}

    def load(self, split: SplitName) -> Split:
        count, parts = self.sizes[split], len(self.couplings)
        counts = [count // parts + (k < count % parts) for k in range(parts)]
        known = [(coupling, n) for coupling, n in zip(self.couplings, counts, strict=True) if n]
        images = torch.cat([self._kept(split, coupling, n) for coupling, n in known])
        cond = {}
        if self.vector_size:
            cond["vector"] = torch.cat([torch.full((n, 1), coupling) for coupling, n in known])
        # the couplings in turn: one after the other they would come in validation batches of one coupling each
        order = torch.cat([torch.arange(n) for _, n in known]).argsort(stable=True)
        images, cond = images[order], {name: values[order] for name, values in cond.items()}
        return Split(images, torch.zeros(count, dtype=torch.int64), cond=cond)

    def configurations(self, data: Tensor) -> Tensor:
        """As they are."""
        return data

    def observables(self, phi: Tensor, weights: Tensor | None = None, block: int = 1) -> dict[str, Estimate]:
        square, neighbours = mean_square(phi, weights, block), neighbour_product(phi, weights, block)
        return {"phi2": square, "nn": neighbours, **_magnetic(phi, weights, block)}

    def check(self, name: SplitName, split: Split) -> None:
        """Nothing: what is simulated here has the shape and the numbers that are stated."""


class Phi4(_Fields):
    r"""The :math:`\phi^4` theory on a periodic lattice (:class:`~ddpm_lightning.lattice.Phi4Action`), by hybrid Monte
    Carlo. The default is the case of Wang, Aarts and Zhou 2023 (arXiv 2309.17082).

    Args:
        L: sites of a side, 2 or more.
        dim: dimensions, 1 to 3.
        kappa: hopping parameter, or several: then it is the condition ``vector`` of each configuration.
        lam: coupling, positive.
        options: n_train, root and the other arguments of :class:`SimulatedLattice`.
    """

    parameter = "kappa"

    def __init__(
        self, L: int = 16, dim: int = 2, kappa: float | list[float] = 0.27, lam: float = 0.022, **options: Any
    ) -> None:
        self.dim, self.kappa, self.lam = dim, kappa, lam
        super().__init__(L, **options)

    def action(self, coupling: float) -> Phi4Action:
        return Phi4Action(coupling, self.lam)

    def exact(self, coupling: float) -> dict[str, float]:
        """Of a ring, by the transfer matrix; in more dimensions nothing is known."""
        if self.dim > 1:
            return {}
        known = phi4_ring_exact(self.L, coupling, self.lam)
        return {"log_Z": known["logZ"], **{name: known[name] for name in ("phi2", "nn", "susceptibility")}}

    def simulate(self, coupling: float, count: int, seed: int) -> Chains:
        try:
            return simulate_phi4(self.L, self.dim, coupling, self.lam, **_chains(count), seed=seed)
        except InputError:
            why = "no trajectory of hybrid Monte Carlo is accepted"
            raise InputError(f"kappa = {coupling:g} with lam = {self.lam:g} cannot be simulated: {why}") from None

    def file_name(self, coupling: float) -> str:
        return f"phi4-kappa{float(coupling)!r}-lam{float(self.lam)!r}-L{self.L}-dim{self.dim}"


class FreeField(_Fields):
    r"""The free scalar field on a periodic lattice (:class:`~ddpm_lightning.lattice.FreeFieldAction`): independent
    configurations, drawn exactly. Its density is known.

    Args:
        L: sites of a side, 2 or more.
        dim: dimensions, 1 to 3.
        m2: squared mass, positive, or several: then it is the condition ``vector`` of each configuration.
        options: n_train, root and the other arguments of :class:`SimulatedLattice`.
    """

    parameter = "m2"

    def __init__(self, L: int = 16, dim: int = 2, m2: float | list[float] = 0.25, **options: Any) -> None:
        self.dim, self.m2 = dim, m2
        super().__init__(L, **options)

    def action(self, coupling: float) -> FreeFieldAction:
        return FreeFieldAction(coupling)

    def exact(self, coupling: float) -> dict[str, float]:
        known = free_field_exact(self.L, self.dim, coupling)
        values = {"log_Z": known["logZ"], "phi2": known["variance"], "nn": known["neighbour_covariance"]}
        return {**values, "susceptibility": 1 / coupling, "Binder cumulant": 0.0}

    def simulate(self, coupling: float, count: int, seed: int) -> Chains:
        return simulate_free_field(self.L, self.dim, coupling, count, seed=seed)

    def file_name(self, coupling: float) -> str:
        return f"free-m2_{float(coupling)!r}-L{self.L}-dim{self.dim}"


def _chains(count: int) -> dict[str, int]:
    """So many chains, and samples of each, for ``count`` samples or a few more."""
    chains = min(_CHAINS, count)
    return {"samples": -(-count // chains), "chains": chains}


def _magnetic(phi: Tensor, weights: Tensor | None, block: int) -> dict[str, Estimate]:
    return {
        "|m|": magnetisation(phi, weights, block),
        "susceptibility": susceptibility(phi, weights, block),
        "Binder cumulant": binder_cumulant(phi, weights, block),
    }
