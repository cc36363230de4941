"""What a full, read-only or vanished disk raises, as one sentence."""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm_lightning.checkpoints.files import last_good
from ddpm_lightning.errors import InputError, RunError

__all__ = ["disk_error", "disk_errors_in"]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def disk_error(error: OSError, folder: Path, path: Path | None = None) -> RunError:
    """The sentence for a file (``path``, or what the error names) that a run in ``folder`` could not write."""
    good = last_good(folder / "checkpoints")
    remedy = "go on with --ckpt_path last" if good else "start again"
    return RunError(
        f"{path or error.filename or folder} cannot be written ({error.strerror or error}); the last good checkpoint "
        f"is {good or 'none'}: once that is mended, {remedy}"
    )


@contextmanager
def disk_errors_in(folder: Path) -> Iterator[None]:
    """Whoever writes, TensorBoard or a profiler: what the disk refuses to a run in ``folder`` becomes a RunError.

    An error in a file elsewhere, such as missing data, is left alone.
    """
    before = threading.excepthook
    threading.excepthook = lambda details: None if _refuses(details.exc_value, folder) else before(details)
    try:
        yield
    except OSError as error:
        # a logger that is closed after an error cannot write either
        first = error.__context__
        while first is not None and not isinstance(first, InputError | RunError):
            first = first.__context__
        if first is not None:
            raise first from None
        if not _refuses(error, folder):
            raise
        raise disk_error(error, folder) from error
    finally:
        threading.excepthook = before


def _refuses(error: Any, folder: Path) -> bool:
    """TensorBoard's thread hands its error on to the main one."""
    if not isinstance(error, OSError):
        return False
    named = isinstance(error.filename, str) and Path(error.filename).absolute().is_relative_to(folder)
    return error.errno in _NO_ROOM or named
