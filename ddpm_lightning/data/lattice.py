"""Lattice systems as data: simulated on first use, and kept in a file."""

import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.data.batches import Split
from ddpm_lightning.data.datamodule import ImageDataModule, SplitName
from ddpm_lightning.data.untrusted import opened
from ddpm_lightning.errors import InputError, at_least, positive
from ddpm_lightning.lattice import Chains, simulate_free_field, simulate_ising, simulate_phi4

__all__ = ["Ising", "free_field_samples", "phi4_samples"]

_SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
# Not options: results of different runs are comparable only on the same data. A change of them, or of the simulators,
# is a new version, whose files have other names.
_VERSION = 1
_CHAINS = 256


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


def phi4_samples(
    split: SplitName,
    L: int = 16,
    dim: int = 2,
    kappa: float = 0.27,
    lam: float = 0.022,
    count: int = 20_000,
    root: str = "data",
    simulation_seed: int = 0,
) -> Tensor:
    r"""Configurations of :math:`\phi^4`, float32 ``[count, 1, *space]``, by hybrid Monte Carlo; simulated once and kept
    in the folder ``lattice`` of ``root``.

    See :func:`~ddpm_lightning.lattice.simulate_phi4` for L, dim, kappa and lam. Splits are independent."""
    name = f"phi4-L{L}-dim{dim}-kappa{float(kappa)!r}-lam{float(lam)!r}-{split}-n{count}-seed{simulation_seed}"
    at_least(1, L=L, dim=dim, count=count)

    def simulated() -> np.ndarray:
        chains = min(_CHAINS, count)
        seed = _seed(simulation_seed, split)
        return _first(simulate_phi4(L, dim, kappa, lam, -(-count // chains), chains=chains, seed=seed), count)

    return _cached(root, name, (count, 1, *(L,) * dim), np.dtype(np.float32), simulated)


def free_field_samples(
    split: SplitName,
    L: int = 16,
    dim: int = 2,
    m2: float = 0.25,
    count: int = 20_000,
    root: str = "data",
    simulation_seed: int = 0,
) -> Tensor:
    """Independent configurations of the free field, float32 ``[count, 1, *space]``; drawn once and kept in the folder
    ``lattice`` of ``root``.

    See :func:`~ddpm_lightning.lattice.simulate_free_field` for L, dim and m2. Splits are independent."""
    name = f"free-L{L}-dim{dim}-m2_{float(m2)!r}-{split}-n{count}-seed{simulation_seed}"
    at_least(1, L=L, dim=dim, count=count)
    return _cached(
        root,
        name,
        (count, 1, *(L,) * dim),
        np.dtype(np.float32),
        lambda: _first(simulate_free_field(L, dim, m2, count, seed=_seed(simulation_seed, split)), count),
    )


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
