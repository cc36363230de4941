"""Checkpoints on disk: written whole or not at all, the one before kept, and read without running what they hold."""

import io
import os
import pickle
import re
import stat
import struct
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from packaging.version import InvalidVersion, Version
from torch import Tensor
from torch.storage import _get_dtype_from_pickle_storage_type

from ddpm_lightning.errors import InputError, RunError

__all__ = ["LAST", "PREVIOUS", "AtomicCheckpointIO", "last_good", "read_checkpoint"]

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

_VERSION = "pytorch-lightning_version"


class _DamagedError(Exception):
    """A file that is not there, empty, torn, or no checkpoint."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoint files, so that a kill at any moment loses none that was whole.

    A checkpoint is written to ``NAME.part`` in the same folder, synchronised to the disk, and renamed. Before
    ``last.ckpt`` is replaced it becomes ``previous.ckpt``, by a hard link where the file system has them, so that
    there is a ``last.ckpt`` at every moment. Files elsewhere (``s3://...``) are Lightning's business.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``path``, or leave everything as it was.

        What is in the way is replaced where that loses nothing (a link, a pipe, an empty folder), and not written to.

        Raises:
            RunError: the file cannot be written: no space left, for example, or a folder in its place.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        # torch's own writer aborts the process where a file cannot be written
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for place in (path, part, path.with_name(PREVIOUS)):
                _remove_folder(place)
            # whatever a file of this name is: through a link, another file would be written to
            part.unlink(missing_ok=True)
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and not path.is_symlink() and path.is_file() and zipfile.is_zipfile(path):
                _keep(path)
            os.replace(part, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the renames, too
            finally:
                os.close(folder)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            good = last_good(path.parent)
            remedy = "go on with --ckpt_path last" if good else "start again"
            raise RunError(
                f"{path} cannot be saved ({error.strerror}); the last good checkpoint is {good or 'none'}: once "
                f"that is mended, {remedy}"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, location: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, or for a ``last.ckpt`` that is damaged the one before it; see :func:`read_checkpoint`."""
        weights_only = weights_only is not False
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        checkpoint = read_checkpoint(path, map_location, weights_only)
        version = checkpoint.setdefault(_VERSION, lightning.__version__)
        try:
            is_known = Version(str(version)) >= Version("2")
        except InvalidVersion:
            is_known = False
        if not is_known:  # Lightning would rewrite it
            raise InputError(f"--ckpt_path {path} is refused: its {_VERSION} is {str(version)[:40]!r}")
        return checkpoint


def _remove_folder(path: Path) -> None:
    """Make way for a file, if the folder in its place is empty."""
    if path.is_dir() and not path.is_symlink():
        try:
            path.rmdir()
        except OSError as error:
            raise OSError(error.errno, f"{path} is a folder: {error.strerror}") from error


def _keep(last: Path) -> None:
    """Let ``previous.ckpt`` be what ``last.ckpt`` is."""
    previous = last.with_name(PREVIOUS)
    link = previous.with_name(f"{PREVIOUS}.part")
    try:
        link.unlink(missing_ok=True)
        os.link(last, link)
    except OSError:  # no hard links here: for a moment there is only previous.ckpt, which a reader takes then
        os.replace(last, previous)
    else:
        os.replace(link, previous)


def last_good(folder: Path) -> Path | None:
    """``last.ckpt`` of a folder, or the one before where it is not there; None where both are missing."""
    return next((folder / name for name in (LAST, PREVIOUS) if os.path.isfile(folder / name)), None)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """The checkpoint in a file, without running code that it holds.

    Args:
        path: the file. A ``last.ckpt`` that is missing, empty or damaged is replaced by the ``previous.ckpt`` beside
            it, and a line says so.
        map_location: torch's.
        weights_only: False lets the file run any code; for files of your own only.

    Raises:
        InputError: no such file, a damaged one, one that would run code, one that is no checkpoint of training.
    """
    path = Path(path)
    try:
        return _read(path, map_location, weights_only)
    except _DamagedError as damage:
        previous = path.with_name(PREVIOUS)
        if path.name != LAST or not os.path.isfile(previous):
            raise InputError(f"--ckpt_path {path} {damage}{_others(path)}") from damage
        try:
            checkpoint = _read(previous, map_location, weights_only)
        except _DamagedError as second:
            raise InputError(f"--ckpt_path {path} {damage}, and {previous} {second}{_others(path)}") from second
        _say(f"{path} {damage}: the checkpoint before it is used, {previous} of step {checkpoint.get('global_step')}")
        return checkpoint


def _others(path: Path) -> str:
    others = sorted(str(other) for other in path.parent.glob("*.ckpt") if other.name not in (path.name, PREVIOUS))
    return f"; there are also {', '.join(others)}" if others else "; there is no other checkpoint beside it"


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)


def _read(path: Path, map_location: Any, weights_only: bool) -> dict[str, Any]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _DamagedError("is no file")  # to open a pipe is to wait for what never comes
        with path.open("rb") as file:
            _check_archive(file, weights_only)
            file.seek(0)
            checkpoint = torch.load(file, map_location=map_location, weights_only=weights_only)
    except _DamagedError:
        raise
    except FileNotFoundError as error:
        raise _DamagedError("does not exist") from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise InputError(
            f"--ckpt_path {path} is refused: it holds {named[1] if named else 'objects'}, and loading that could run "
            "any code; --weights_only false loads it nevertheless, if you trust whoever wrote it"
        ) from error
    except OSError as error:
        raise _DamagedError(f"cannot be read ({error.strerror})") from error
    except Exception as error:
        raise _DamagedError(f"is damaged ({str(error).partition(chr(10))[0][:80]})") from error
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), Mapping)):
        raise InputError(f"--ckpt_path {path} is no checkpoint of a training run: it has no state_dict")
    state = checkpoint["state_dict"]
    strange = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    strange += [name for name in ("epoch", "global_step") if type(checkpoint.get(name, 0)) is not int]
    if strange or min(checkpoint.get("epoch", 0), checkpoint.get("global_step", 0)) < 0:
        raise InputError(
            f"--ckpt_path {path} is no checkpoint of a training run: {str(strange)[:60]} in it are none of its"
        )
    return checkpoint


def _check_archive(file: IO[bytes], weights_only: bool) -> None:
    """Refuse an archive that is not, to the last byte that matters, as ``torch.save`` writes it.

    torch itself looks neither at the sums of what it reads nor at the sizes: a storage that claims to be larger than
    its record would be read from the memory beyond it.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise _DamagedError("is empty")
    file.seek(max(0, size - _END.size))
    end = file.read()
    if len(end) < _END.size or (_END.unpack(end)[0], _END.unpack(end)[-1]) != (b"PK\5\6", 0):
        raise _DamagedError("is torn, or no checkpoint")
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
        if len(sizes) < len(entries) or len({entry.filename.partition("/")[0] for entry in entries}) != 1:
            raise _DamagedError("is damaged (two of its records have one name)")
        # of what is marked as a folder torch reads nothing, and takes what is in the memory for it
        if any(entry.is_dir() or entry.external_attr & _FOLDER for entry in entries):
            raise _DamagedError("is damaged (one of its records is a folder)")
        if sum(sizes.values()) > size or any(
            entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries
        ):
            raise _DamagedError("is damaged (the sizes of its records are wrong)")
        if (spoilt := archive.testzip()) is not None:
            raise _DamagedError(f"is damaged (the sum of {spoilt} is wrong)")
        if weights_only:
            name = next(entry.filename for entry in entries if entry.filename.endswith("/data.pkl"))
            _Storages(io.BytesIO(archive.read(name)), sizes).load()
    except (StopIteration, zipfile.BadZipFile, struct.error) as error:
        raise _DamagedError(f"is damaged ({error or 'it has no data.pkl'})") from error


_END = struct.Struct("<4s4H2LH")
_FOLDER = 0x10


class _Anything:
    """Stands for every object that a pickle makes, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Anything":
        return object.__new__(cls)

    def ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


class _Storages(pickle._Unpickler):  # the one in C fills the memory if a pickle says so
    """Goes through a pickle, makes nothing of it, and compares the storages that it names with the file's records."""

    def __init__(self, file: IO[bytes], sizes: Mapping[str, int]) -> None:
        super().__init__(file)
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> type:
        return type(name, (_Anything,), {})

    def persistent_load(self, pid: Any) -> _Anything:
        kind, storage, key, _, count = pid
        name = storage.__name__
        itemsize = 1 if name == "UntypedStorage" else _get_dtype_from_pickle_storage_type(name).itemsize
        if kind != "storage" or type(count) is not int or count * itemsize != self._sizes[f"data/{key}"]:
            raise _DamagedError(f"is damaged (data/{key} is not of the size that is claimed)")
        return _Anything()
