"""One training at a time in a run's folder."""

import fcntl
import os
import socket
from pathlib import Path

from ddpm_lightning.errors import InputError

__all__ = ["RunLock"]


class RunLock:
    """Held as a context, and no longer than its process lives, however that ends.

    The kernel forgets a lock with the process that holds it, so a killed run leaves none behind; RUN/.lock, which
    stays, says who holds or held it. On a file system without locks nothing is checked.

    Args:
        run_dir: the folder.

    Raises:
        InputError: another process trains in it.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / ".lock"
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise InputError(
                f"--run_dir {run_dir} is being trained in by another process ({holder}): "
                "wait for it, or choose another folder"
            ) from None
        except OSError:
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._file.close()
