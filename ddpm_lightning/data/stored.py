"""Arrays in files, read row by row: .npy, .npz, HDF5 and zarr."""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.errors import InputError

__all__ = ["ArrayFile", "StoredRows"]

_HDF5 = (".h5", ".hdf5", ".hdf", ".he5")
_USUAL = ("fields", "x", "images", "data")


class ArrayFile:
    """A file with one array or several by name.

    Args:
        path: .npy, .npz, HDF5 (.h5, .hdf5) or a folder .zarr.
        option: the option that named it, for what is said of a bad one.

    Raises:
        InputError: there is no such file, it is of another kind, damaged, or its library is not installed.
    """

    def __init__(self, path: str, option: str = "--data.path") -> None:
        self.path, self.option = Path(path).expanduser(), option
        if not self.path.exists():
            raise InputError(f"{option} {path}: there is no such file ({self.path.absolute()})")
        kinds = {".npy": self._npy, ".npz": self._npz, ".zarr": self._zarr, **dict.fromkeys(_HDF5, self._hdf5)}
        self._kind = self.path.suffix.lower()
        if self._kind not in kinds:
            raise InputError(f"{option} {path}: give a .npy, .npz, .h5, .hdf5 or .zarr file")
        # to open a pipe is to wait for what never comes
        if not (self.path.is_dir() if self._kind == ".zarr" else self.path.is_file()):
            raise InputError(f"{option} {path} is no {'folder' if self._kind == '.zarr' else 'regular file'}")
        self._open = kinds[self._kind]
        try:
            with _reading(f"{option} {path}"):
                self.names: list[str] = self._open(None)
        except ImportError as error:
            raise InputError(f'{option} {path} needs {error.name}: pip install "ddpm-lightning[fields]"') from None

    def array(self, name: str | None, option: str | None) -> "_Array":
        """The array of a name; None for the only one, or the one called ``x``, ``fields`` or ``images``.

        Args:
            name: of the array.
            option: the option that gives the name, for what is said of a bad one; None where there is none.

        Raises:
            InputError: there is none of that name, or several where none is named; objects instead of numbers.
        """
        if name is None:
            usual = [each for each in _USUAL if each in self.names]
            if len(self.names) != 1 and not usual:
                choose = f"choose one with {option}" if option else f"call the one that is meant {_USUAL[0]}"
                choose = choose if self.names else "give another file"
                raise InputError(f"{self.option} {self.path} holds {self._listed()}: {choose}")
            name = self.names[0] if len(self.names) == 1 else usual[0]
        elif self._kind == ".npy":
            raise InputError(f"{option} {name}: a .npy file holds one array without a name; use .npz, HDF5 or zarr")
        elif name not in self.names:
            raise InputError(f"{option} {name}: {self.path} holds {self._listed()}")
        with _reading(f"{self.path}, {name or 'its array'}:"):
            array: _Array = self._open(name)
        if array.dtype.kind not in "fiub":
            raise InputError(f"{self.path}, {name or 'its array'}: holds {array.dtype} and no real numbers")
        return array

    def _listed(self) -> str:
        if self.names == [""]:
            return "one array without a name"
        return f"the arrays {', '.join(self.names)}" if self.names else "no array"

    def _npy(self, name: str | None) -> Any:
        with self.path.open("rb") as file:
            shape, fortran, dtype = _header(file)
            start = file.tell()
        if name is None:
            return [""]
        if fortran or dtype.hasobject:
            return _Array(lambda: np.load(self.path, allow_pickle=False), shape, dtype, must_load=True)
        found = _Array(lambda: _RawRows(self.path, start, dtype, shape), shape, dtype)
        _check_length(found, self.path.stat().st_size - start)
        return found

    def _npz(self, name: str | None) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            members = {each.filename.removesuffix(".npy"): each for each in archive.infolist()}
            if name is None:
                return list(members)
            member = members[name]
            with archive.open(member) as file:
                shape, fortran, dtype = _header(file)
                header = file.tell()
        if fortran or dtype.hasobject or member.compress_type != zipfile.ZIP_STORED:

            def loaded() -> np.ndarray:
                with np.load(self.path, allow_pickle=False) as arrays:
                    whole: np.ndarray = arrays[name]
                return whole

            return _Array(loaded, shape, dtype, must_load=True)
        with self.path.open("rb") as raw:
            # of a member of a zip file: 30 bytes, of which the last four are the lengths of a name and of extra fields
            raw.seek(member.header_offset + 26)
            lengths = np.frombuffer(raw.read(4), "<u2")
        start = member.header_offset + 30 + int(lengths.sum()) + header
        found = _Array(lambda: _RawRows(self.path, start, dtype, shape), shape, dtype)
        _check_length(found, member.file_size - header)
        return found

    def _hdf5(self, name: str | None) -> Any:
        import h5py  # type: ignore[import-untyped]

        if name is None:
            names: list[str] = []
            with h5py.File(self.path) as file:
                file.visititems(lambda key, item: names.append(key) if isinstance(item, h5py.Dataset) else None)
            return names
        with h5py.File(self.path) as file:
            shape, dtype = file[name].shape, file[name].dtype
        if shape is None:
            raise ValueError("it is empty")
        return _Array(lambda: _Closing(h5py.File(self.path), name), shape, dtype, sorted_only=True)

    def _zarr(self, name: str | None) -> Any:
        import zarr

        store = zarr.open(str(self.path), mode="r")
        if isinstance(store, zarr.Array):
            return [""] if name is None else _Array(lambda: store, store.shape, store.dtype)
        arrays: dict[str, Any] = dict(store.arrays())
        return list(arrays) if name is None else _Array(lambda: arrays[name], arrays[name].shape, arrays[name].dtype)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of a .npy file, which is left at its first number."""
    try:
        version = np.lib.format.read_magic(file)
    except ValueError:
        raise ValueError("it does not begin as a .npy array does") from None
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"it is of version {version[0]}.{version[1]} of .npy, which nobody knows")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    found: tuple[tuple[int, ...], bool, np.dtype] = read(file)
    return found


def _check_length(array: "_Array", there: int) -> None:
    """Before anything of the size that a damaged file claims is asked for."""
    if array.nbytes > there and min(array.shape, default=1) >= 0:
        raise ValueError(f"it is cut short: it holds {there:,} bytes of {array.nbytes:,}")


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """InputError for whatever a reader of files says of a damaged one; they raise whatever they run into."""
    try:
        yield
    except (InputError, ImportError, MemoryError):
        raise
    except Exception as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise InputError(f"{what} cannot be read: {' '.join(reason.split())[:200]}") from None


class _RawRows:
    """Rows of an array that lies in a file as it does in memory. Read, not mapped: what was touched of a map counts as
    memory of the process, and single rows of a map come with their neighbours.
    """

    def __init__(self, path: Path, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.path, self.start, self.dtype, self.shape = path, start, dtype, shape

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(self.shape[0])[rows]
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        buffer = found.reshape(len(rows), int(np.prod(self.shape[1:]))).view(np.uint8)
        with self.path.open("rb") as file:
            for row, place in zip(rows.tolist(), buffer, strict=True):
                file.seek(self.start + row * buffer.shape[1])
                if file.readinto(place.data) != len(place):
                    raise OSError(f"the file ends before row {row}")
        return found


class _Closing:
    """A data set of an HDF5 file that is closed after one read."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name = file, name

    def __getitem__(self, rows: Any) -> Any:
        with self.file:
            return self.file[self.name][rows]


@dataclass(frozen=True, eq=False)
class _Array:
    """One array of a file."""

    open: Callable[[], Any]
    shape: tuple[int, ...]
    dtype: np.dtype
    sorted_only: bool = False  # rows must be read in rising order, each once
    must_load: bool = False  # a compressed one has no rows to go to

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.float64) * self.dtype.itemsize)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows int64 ``[n]``, in any order."""
        if not self.sorted_only:
            source = self.open()
            return np.array(source.oindex[rows] if hasattr(source, "oindex") else source[rows])
        unique, inverse = np.unique(rows, return_inverse=True)
        found: np.ndarray = self.open()[unique]
        return found[inverse]


class StoredRows:
    """Rows of an array in a file, indexed like a float32 tensor ``[N, C, *space]`` on the CPU that nobody has read.

    Args:
        array: the array in the file.
        rows: int64 ``[N]``, its rows.
        shape: (C, *space) of a row.
        name: what the rows are called in what is said of bad ones.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, array: _Array, rows: np.ndarray, shape: Sequence[int], name: str) -> None:
        self.array, self.rows, self.row_shape, self.name = array, rows, tuple(shape), name

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.row_shape)

    @property
    def nbytes(self) -> int:
        return 4 * int(np.prod(self.shape, dtype=np.float64))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Any) -> Tensor:
        """The rows of a slice or of int64 ``[n]``, read from the file.

        Raises:
            InputError: one holds NaN, infinity or a number that is infinite as float32; the file can no longer be read;
                its rows are of another size.
        """
        rows = self.rows[chosen.cpu().numpy() if isinstance(chosen, Tensor) else chosen]
        with _reading(self.name):
            values = self.array.read(rows)
        if np.prod(values.shape[1:]) != np.prod(self.row_shape):
            raise InputError(
                f"{self.name}: has rows of shape {list(values.shape[1:])}, and {list(self.row_shape)} is needed"
            )
        with np.errstate(over="ignore"):
            found = torch.from_numpy(values.astype(np.float32, copy=False)).reshape(len(rows), *self.row_shape)
        if not bool(torch.isfinite(found).all()):
            bad = int(torch.nonzero(~torch.isfinite(found.reshape(len(rows), -1)).all(1))[0])
            what = "a number that float32 cannot hold" if np.isfinite(values[bad]).all() else "NaN or infinity"
            raise InputError(f"{self.name}, row {int(rows[bad])}: holds {what}; mend or leave out that row")
        return found

    def classes(self, last: int) -> Tensor:
        """All rows as classes, int64 ``[N]``.

        Raises:
            InputError: they are no whole numbers ``[N]``, or one is negative or above ``last``.
        """
        if self.array.dtype.kind not in "iu" or len(self.array.shape) != 1:
            what = f"{self.array.dtype} {list(self.array.shape)}"
            raise InputError(f"{self.name}: holds {what}; classes are whole numbers [N]")
        with _reading(self.name):
            found = self.array.read(self.rows)
        if found.min() < 0:
            raise InputError(f"{self.name}: holds {found.min()}; classes are numbered from 0")
        if found.max() > last:
            raise InputError(f"{self.name}: holds {found.max()}; classes are 0..{last}, numbered without gaps")
        return torch.from_numpy(found.astype(np.int64))

    def in_memory(self) -> Tensor:
        """All rows."""
        if self.array.must_load:
            with _reading(self.name):
                whole = self.array.open()
            return StoredRows(_Array(lambda: whole, self.array.shape, self.array.dtype), self.rows, self.row_shape,
                              self.name)[:]  # fmt: skip
        return self[:]

    def to(self, device: torch.device) -> Tensor:
        return self.in_memory().to(device)
