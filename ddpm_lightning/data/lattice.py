"""Lattice systems as data: simulated on first use, and kept in a file."""

import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.data.batches import Split
from ddpm_lightning.data.datamodule import ArrayDataModule, ImageDataModule, SplitName
from ddpm_lightning.data.untrusted import opened
from ddpm_lightning.errors import InputError, at_least, positive
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

__all__ = ["FreeField", "Ising", "LatticeSystem", "Phi4", "by_chain"]

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


class Ising(ImageDataModule):
    """The Ising model on an L x L torus: one channel, two grey levels, 0 for spin -1 and 1 for spin 1, one class.

    The entropy of these data is exact, ``ising_exact(L, beta)["bits_per_spin"]``: what a model's bits/dim lie above it
    is the divergence of the data from the model. The splits come from independent seeds. A split is simulated once by a
    cluster algorithm (20,000 configurations of 16 x 16 take about 10 seconds of a CPU core) and kept in the folder
    ``lattice`` of ``root``.

    Args:
        L: sites of a side, 2 or more.
        beta: inverse temperature, positive; the critical one of a large lattice is ln(1 + sqrt 2) / 2 = 0.4407.
        n_train: number of training configurations.
        n_val: number of configurations for validation.
        n_test: number of configurations for tests.
        root: folder for the simulated configurations.
        simulation_seed: another one is another draw of all three splits. ``seed`` is the order of the training images.
    """

    levels = 2
    num_classes = 1

    def __init__(
        self,
        L: int = 16,
        beta: float = 0.44,
        n_train: int = 20_000,
        n_val: int = 2_000,
        n_test: int = 10_000,
        root: str = "data",
        simulation_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        at_least(2, L=L)
        positive(beta=beta)
        at_least(1, n_train=n_train, n_val=n_val, n_test=n_test)
        at_least(0, simulation_seed=simulation_seed)
        super().__init__({"train": n_train, "val": n_val, "test": n_test}, **kwargs)
        self.shape = (1, L, L)
        self.L, self.beta, self.root, self.simulation_seed = L, beta, root, simulation_seed

        self.couplings = [beta]

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

    def prepare_data(self) -> None:
        """Simulate the splits that are not there; InputError where they cannot be kept."""
        for split in _SPLITS:
            self._levels(split)

    def load(self, split: SplitName) -> Split:
        images = self._levels(split)
        return Split(images, torch.zeros(len(images), dtype=torch.int64))

    def _levels(self, split: SplitName) -> Tensor:
        count = self.sizes[split]
        name = f"ising-L{self.L}-beta{float(self.beta)!r}-{split}-n{count}-seed{self.simulation_seed}"

        def simulated() -> np.ndarray:
            chains = min(_CHAINS, count)
            seed = _seed(self.simulation_seed, split)
            return _first(simulate_ising(self.L, self.beta, -(-count // chains), chains=chains, seed=seed), count)

        return _cached(
            self.root, name, (count, *self.shape), np.dtype(np.uint8), lambda: (simulated() > 0).astype(np.uint8)
        )


class _LatticeFields(ArrayDataModule):
    """Real fields on a periodic lattice of ``dim`` dimensions with ``L`` sites a side, for one coupling or several.

    With several, the splits hold them in equal shares, and each row has its coupling as the condition ``vector``.
    """

    levels = None
    num_classes = None

    def _set(self, L: int, dim: int, coupling: float | list[float], root: str, simulation_seed: int) -> None:
        at_least(2, L=L)
        at_least(1, dim=dim)
        at_least(0, simulation_seed=simulation_seed)
        if dim > 3:
            raise InputError(f"dim = {dim} must be 1, 2 or 3")
        self.couplings = list(coupling) if isinstance(coupling, list) else [coupling]
        if not self.couplings:
            raise InputError("a list of couplings must hold one at least")
        self.L, self.dim, self.root, self.simulation_seed = L, dim, root, simulation_seed
        self.shape = (1, *(L,) * dim)
        self.vector_size = 1 if isinstance(coupling, list) else None

    @cached_property
    def scale(self) -> Mapping[str, Sequence[float]]:  # type: ignore[override]  # measured on first use
        """Mean 0, by symmetry, and the standard deviation of a site in the training split."""
        return {"mean": [0.0], "std": [float(self.split("train").images.double().square().mean().sqrt())]}

    def prepare_data(self) -> None:
        """Simulate the splits that are not there; InputError where they cannot be kept."""
        for name in _SPLITS:
            self.split(name)

    def load(self, split: SplitName) -> Split:
        count, parts = self.sizes[split], len(self.couplings)
        counts = [count // parts + (k < count % parts) for k in range(parts)]
        known = [(coupling, n) for coupling, n in zip(self.couplings, counts, strict=True) if n]
        images = torch.cat([self._samples(split, coupling, n) for coupling, n in known])
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

    def _samples(self, split: SplitName, coupling: float, count: int) -> Tensor:
        raise NotImplementedError

    def _kept(self, split: SplitName, name: str, count: int, simulate: Callable[[int], Chains]) -> Tensor:
        """Configurations of a split, simulated by ``simulate(seed)`` unless a file holds them."""
        name = f"{name}-L{self.L}-dim{self.dim}-{split}-n{count}-seed{self.simulation_seed}"
        seed = _seed(self.simulation_seed, split)
        return _cached(
            self.root, name, (count, *self.shape), np.dtype(np.float32), lambda: _first(simulate(seed), count)
        )


class Phi4(_LatticeFields):
    r"""The :math:`\phi^4` theory on a periodic lattice (:class:`~ddpm_lightning.lattice.Phi4Action`), by hybrid Monte
    Carlo, simulated once and kept in the folder ``lattice`` of ``root``. The default is the case of Wang, Aarts and
    Zhou 2023 (arXiv 2309.17082).

    Args:
        L: sites of a side.
        dim: dimensions, 1 to 3.
        kappa: hopping parameter, or several: then it is the condition ``vector`` of each configuration.
        lam: coupling, 0 or more.
        n_train: number of training configurations.
        n_val: number of configurations for validation.
        n_test: number of configurations for tests.
        root: folder for the simulated configurations.
        simulation_seed: another one is another draw of all three splits.
        options: as of :class:`~ddpm_lightning.data.datamodule.ArrayDataModule`.
    """

    def __init__(
        self,
        L: int = 16,
        dim: int = 2,
        kappa: float | list[float] = 0.27,
        lam: float = 0.022,
        n_train: int = 20_000,
        n_val: int = 2_000,
        n_test: int = 10_000,
        root: str = "data",
        simulation_seed: int = 0,
        **options: Any,
    ) -> None:
        for each in kappa if isinstance(kappa, list) else [kappa]:
            Phi4Action(each, lam)  # refuses what makes no sense
        at_least(1, n_train=n_train, n_val=n_val, n_test=n_test)
        super().__init__({"train": n_train, "val": n_val, "test": n_test}, **options)
        self._set(L, dim, kappa, root, simulation_seed)
        self.kappa, self.lam = kappa, lam

    def action(self, coupling: float) -> Phi4Action:
        return Phi4Action(coupling, self.lam)

    def exact(self, coupling: float) -> dict[str, float]:
        """Of a ring, by the transfer matrix; in more dimensions nothing is known."""
        if self.dim > 1:
            return {}
        known = phi4_ring_exact(self.L, coupling, self.lam)
        return {"log_Z": known["logZ"], **{name: known[name] for name in ("phi2", "nn", "susceptibility")}}

    def _samples(self, split: SplitName, coupling: float, count: int) -> Tensor:
        def simulate(seed: int) -> Chains:
            chains = min(_CHAINS, count)
            return simulate_phi4(self.L, self.dim, coupling, self.lam, -(-count // chains), chains=chains, seed=seed)

        name = f"phi4-kappa{float(coupling)!r}-lam{float(self.lam)!r}"
        return self._kept(split, name, count, simulate)


class FreeField(_LatticeFields):
    r"""The free scalar field on a periodic lattice (:class:`~ddpm_lightning.lattice.FreeFieldAction`): independent
    configurations, drawn exactly, once, and kept in the folder ``lattice`` of ``root``. Its density is known.

    Args:
        L: sites of a side.
        dim: dimensions, 1 to 3.
        m2: squared mass, positive, or several: then it is the condition ``vector`` of each configuration.
        n_train: number of training configurations.
        n_val: number of configurations for validation.
        n_test: number of configurations for tests.
        root: folder for the configurations.
        simulation_seed: another one is another draw of all three splits.
        options: as of :class:`~ddpm_lightning.data.datamodule.ArrayDataModule`.
    """

    def __init__(
        self,
        L: int = 16,
        dim: int = 2,
        m2: float | list[float] = 0.25,
        n_train: int = 20_000,
        n_val: int = 2_000,
        n_test: int = 10_000,
        root: str = "data",
        simulation_seed: int = 0,
        **options: Any,
    ) -> None:
        for each in m2 if isinstance(m2, list) else [m2]:
            FreeFieldAction(each)  # refuses what makes no sense
        at_least(1, n_train=n_train, n_val=n_val, n_test=n_test)
        super().__init__({"train": n_train, "val": n_val, "test": n_test}, **options)
        self._set(L, dim, m2, root, simulation_seed)
        self.m2 = m2

    def action(self, coupling: float) -> FreeFieldAction:
        return FreeFieldAction(coupling)

    def exact(self, coupling: float) -> dict[str, float]:
        known = free_field_exact(self.L, self.dim, coupling)
        values = {"log_Z": known["logZ"], "phi2": known["variance"], "nn": known["neighbour_covariance"]}
        return {**values, "susceptibility": 1 / coupling, "Binder cumulant": 0.0}

    def _samples(self, split: SplitName, coupling: float, count: int) -> Tensor:
        def simulate(seed: int) -> Chains:
            return simulate_free_field(self.L, self.dim, coupling, count, seed=seed)

        return self._kept(split, f"free-m2_{float(coupling)!r}", count, simulate)


def _magnetic(phi: Tensor, weights: Tensor | None, block: int) -> dict[str, Estimate]:
    return {
        "|m|": magnetisation(phi, weights, block),
        "susceptibility": susceptibility(phi, weights, block),
        "Binder cumulant": binder_cumulant(phi, weights, block),
    }


def _seed(seed: int, split: SplitName) -> int:
    """Independent seeds: hashed, so that no split of one seed is one of another seed."""
    at_least(0, simulation_seed=seed)
    if split not in _SPLITS:
        raise InputError(f"split = {split!r} must be one of {', '.join(_SPLITS)}")
    return int(np.random.SeedSequence(seed, spawn_key=(_SPLITS.index(split),)).generate_state(1)[0])


def _first(chains: Chains, count: int) -> np.ndarray:
    """Neighbours are samples of different chains, so the first so many of a split are independent, too."""
    return chains.interleaved[:count].numpy()


def _cached(
    root: str, name: str, shape: tuple[int, ...], dtype: np.dtype, simulate: Callable[[], np.ndarray]
) -> Tensor:
    """The array of a file, made and written first where there is none or a damaged one."""
    path = (Path(root).expanduser() / "lattice" / f"{name}-v{_VERSION}.npy").resolve()
    values = _read(path, shape, dtype)
    if values is None:
        print(f"simulating {shape[0]:,} configurations: {path}", file=sys.stderr, flush=True)
        values = np.ascontiguousarray(simulate(), dtype)
        _write(path, values)
    return torch.from_numpy(values)


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    start = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(start, description)
    return start.getvalue()


def _read(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """None for a file that is not there, of another length, or not as it was written.

    A checksum follows the array; numpy.load does not see it."""
    header = _header(shape, dtype)
    size = len(header) + int(np.prod(shape)) * dtype.itemsize
    if not path.exists():
        return None
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size != size + hashlib.sha256().digest_size:
            return None
        content = bytearray(file.read())
    if content[: len(header)] != header or hashlib.sha256(memoryview(content)[:size]).digest() != content[size:]:
        return None
    return np.frombuffer(content, dtype, int(np.prod(shape)), len(header)).reshape(shape)


def _write(path: Path, values: np.ndarray) -> None:
    """The whole file or none, whoever else writes it."""
    content = _header(values.shape, values.dtype) + values.tobytes()
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".unfinished-", delete=False) as file:
            part = Path(file.name)
            file.write(content + hashlib.sha256(content).digest())
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)  # a temporary file is its owner's alone
        os.replace(part, path)
    except OSError as error:
        if part is not None:
            with suppress(OSError):
                part.unlink()
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): set --data.root to a folder with room that can be"
            " written to"
        ) from None
