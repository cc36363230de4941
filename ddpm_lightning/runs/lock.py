"""One process at a time in a folder."""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm_lightning.errors import InputError
from ddpm_lightning.runs.disk import disk_error

__all__ = ["hold"]


@contextmanager
def hold(path: Path, doing: str) -> Iterator[None]:
    """Hold a lock file while the context is open.

    The kernel releases the lock when the process ends, however it ends, so a killed run leaves none behind. The file
    stays and says who holds or held the lock. On a file system without locks nothing is checked. (filelock, which torch
    requires, would empty the file that names the holder in its versions before 4.) ``doing`` says what the lock is for,
    as in "is being trained in".

    Raises:
        InputError: another process holds it, or ``path`` is something else than a file.
        RunError: it cannot be written: no space left, for example.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # neither wait for the other end of a FIFO, nor write to the target of a link
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise disk_error(error, path.parent, path) from error
        raise InputError(f"{path} cannot be opened as a lock file ({error.strerror}): remove it") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"{path} is not a regular file: remove it")
    with os.fdopen(handle, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path.parent} {doing} by another process ({file.read().strip()}): "
                "wait for it, or choose another folder"
            ) from None
        except OSError:
            yield
            return
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise disk_error(error, path.parent, path) from error
        yield
