"""Checkpoints on disk: written whole or not at all, the one before kept, and read without running what they hold."""

import io
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from ddpm_lightning.errors import InputError, RunError

__all__ = [
    "LAST",
    "PREVIOUS",
    "AtomicCheckpointIO",
    "check_hyperparameters",
    "last_good",
    "read_checkpoint",
    "read_last_good",
]

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

# what hyper-parameters may name; DDPM_TRUSTED adds to it
_TRUSTED = ("ddpm_lightning", "torch.nn", "torch.optim", "lightning.pytorch.cli")


class _DamagedError(Exception):
    """A file that is not there, empty, torn, or not a checkpoint."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoint files, so that a kill at any moment loses none that was whole.

    A checkpoint is written to ``NAME.part`` in the same folder, synchronised to the disk, and renamed. Before
    ``last.ckpt`` is replaced it becomes ``previous.ckpt``, by a hard link where the file system has them, so that
    there is a ``last.ckpt`` at every moment. Files elsewhere (``s3://...``) are Lightning's business.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``path``, or leave everything as it was.

        Raises:
            RunError: the file cannot be written: no space left, for example.
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
            with part.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and zipfile.is_zipfile(path):
                _keep(path)
            os.replace(part, path)
            _synchronise(path.parent)
        except OSError as error:
            part.unlink(missing_ok=True)
            good = last_good(path.parent)
            raise RunError(
                f"{path} cannot be saved ({error.strerror}); the last good checkpoint is {good or 'none'}: once "
                "that is mended, go on with --ckpt_path last"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, location: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, or for a ``last.ckpt`` that is damaged the one before it; see :func:`read_checkpoint`."""
        weights_only = weights_only is not False
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, map_location, weights_only)


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


def _synchronise(folder: Path) -> None:
    """Have the folder's renames on the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def last_good(folder: Path) -> Path | None:
    """``last.ckpt`` of a folder, or the one before where it is not there; None where both are missing."""
    return next((folder / name for name in (LAST, PREVIOUS) if (folder / name).is_file()), None)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """The checkpoint in a file, without running code that it holds.

    Args:
        path: the file. A ``last.ckpt`` that is missing, empty or torn is replaced by the ``previous.ckpt`` beside it,
            and a line says so.
        map_location: torch's.
        weights_only: False lets the file run any code; for files of your own only.

    Raises:
        InputError: no such file, a damaged one, one that would run code, one that is no checkpoint of training.
    """
    return read_last_good(path, map_location, weights_only)[1]


def read_last_good(
    path: str | Path, map_location: Any = "cpu", weights_only: bool = True
) -> tuple[Path, dict[str, Any]]:
    """As :func:`read_checkpoint`, with the name of the file that was read."""
    path = Path(path)
    try:
        return path, _read(path, map_location, weights_only)
    except _DamagedError as damage:
        previous = path.with_name(PREVIOUS)
        if path.name != LAST or not previous.is_file():
            raise InputError(f"--ckpt_path {path} {damage}{_others(path)}") from damage
        try:
            checkpoint = _read(previous, map_location, weights_only)
        except _DamagedError as second:
            raise InputError(f"--ckpt_path {path} {damage}, and {previous} {second}{_others(path)}") from second
        _say(f"{path} {damage}: the checkpoint before it is used, {previous} of step {checkpoint.get('global_step')}")
        return previous, checkpoint


def _others(path: Path) -> str:
    """What else there is to go on with."""
    others = sorted(str(other) for other in path.parent.glob("*.ckpt") if other.name not in (path.name, PREVIOUS))
    return f"; there are also {', '.join(others)}" if others else "; there is no other checkpoint beside it"


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)


def _read(path: Path, map_location: Any, weights_only: bool) -> dict[str, Any]:
    if not path.is_file():
        raise _DamagedError("does not exist")
    if path.stat().st_size == 0:
        raise _DamagedError("is empty")
    if not zipfile.is_zipfile(path):
        raise _DamagedError("is torn, or no checkpoint")
    try:
        # torch itself does not look at the sums of what it reads
        with zipfile.ZipFile(path) as archive:
            spoilt = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        raise _DamagedError(f"is damaged ({error})") from error
    if spoilt is not None:
        raise _DamagedError(f"is damaged (the sum of {spoilt} is wrong)")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=weights_only)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise _DamagedError(f"is damaged ({str(error).partition(chr(10))[0][:80]})") from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise InputError(
            f"--ckpt_path {path} is refused: it holds {named[1] if named else 'objects'}, and loading that could run "
            "any code; --weights_only false loads it nevertheless, if you trust whoever wrote it"
        ) from error
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("state_dict"), Mapping)):
        raise InputError(f"--ckpt_path {path} is no checkpoint of a training run: it has no state_dict")
    return checkpoint


def check_hyperparameters(checkpoint: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters that would import a module, and so run its code, of a package that is not trusted.

    Trusted are this package, ``torch.nn``, ``torch.optim``, and what the variable ``DDPM_TRUSTED`` names: packages or
    modules, separated by commas. Only plain words are let through, since jsonargparse would read configurations, and
    files of them, out of other strings.

    Args:
        checkpoint: a checkpoint that has been read, and not yet been used.

    Raises:
        InputError: naming the class.
    """
    _check_value(checkpoint.get("hyper_parameters", {}), (*_TRUSTED, *os.environ.get("DDPM_TRUSTED", "").split(",")))


def _check_value(value: Any, trusted: tuple[str, ...]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_value(key, ())
            _check_value(item, trusted)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_value(item, trusted)
    elif isinstance(value, str):
        if not re.fullmatch(r"[\w.+\-/]*", value) or Path(value).is_file():
            raise InputError(f"the checkpoint's hyper-parameters hold {value[:80]!r}, which is refused: no plain word")
        dotted = re.fullmatch(r"\w+(\.\w+)+", value) and not re.fullmatch(r"[\d.]+", value)
        if dotted and not any(name and f"{value}.".startswith(f"{name}.") for name in trusted):
            raise InputError(
                f"the checkpoint's hyper-parameters name {value}, which is refused, since importing it runs its code; "
                f"if you trust it: DDPM_TRUSTED={value.partition('.')[0]}"
            )
