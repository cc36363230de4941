"""Arrays that are made once and kept in a file."""

import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from ddpm_lightning.data.untrusted import opened
from ddpm_lightning.errors import InputError

__all__ = ["kept"]


def kept(path: Path, shape: tuple[int, ...], dtype: np.dtype, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of a .npy file; ``make`` makes it, and it is written first, where there is no file or a damaged one.

    Raises:
        InputError: the file cannot be read or written.
    """
    path = path.resolve()
    values = _read(path, shape, dtype)
    if values is None:
        print(f"simulating {shape[0]:,} configurations: {path}", file=sys.stderr, flush=True)
        values = np.ascontiguousarray(make(), dtype)
        _write(path, values)
    return values


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
