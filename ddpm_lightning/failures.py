"""How a program ends: one sentence for whatever stopped it, and a status."""

import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ddpm_lightning.errors import InputError, RunError
from ddpm_lightning.own_code import is_installed

__all__ = ["TRACEBACK", "end", "told"]

TRACEBACK = "DDPM_TRACEBACK"
"""Where this variable is set and not empty, the traceback is shown at once."""

_PACKAGE = Path(__file__).parent
_NO_MEMORY = ("not enough memory", "can't allocate memory")  # what torch says of a CPU's


def end(error: BaseException, program: str, folder: Path | None = None) -> int:
    """Say on standard error what stopped a program, and return its exit status.

    2 for bad input, 130 for an interruption, else 1. What no part of the package foresaw has its full traceback
    written: into ``folder`` where this is given, exists and can be written to, else into a file of its own.

    Args:
        error: the exception.
        program: its name.
        folder: the run's folder.
    """
    if isinstance(error, BrokenPipeError):  # as in "ddpm ... | head"
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the interpreter flushes it when it ends
        return 1
    sentence, status = told(error, folder)
    print(f"{program}: error: {sentence}", file=sys.stderr)
    return status


def told(error: BaseException, folder: Path | None = None) -> tuple[str, int]:
    """The sentence and the exit status of :func:`end`."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        sentence, status = "interrupted", 130
    elif isinstance(error, InputError | MisconfigurationException):
        sentence, status = str(error), 2
    elif isinstance(error, RunError):
        sentence, status = str(error), 1
    elif isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY):
        sentence = "the memory is full: try a smaller batch_size, eval_batch_size, network, or smaller data"
        sentence, status = f"{sentence} ({_in_a_line(error)}); {_written(error, folder)}", 1
    else:
        sentence, status = f"{_in_a_line(error)} ({_place(error)}); {_written(error, folder)}", 1
    return sentence, status


def _in_a_line(error: BaseException) -> str:
    """Kind and message."""
    message = " ".join(str(error).split())
    shown = message if len(message) <= 300 else f"{message[:300]} ..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def _place(error: BaseException) -> str:
    """File and line of the user's own code in which an exception arose, else of this package, else anywhere."""
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [place for place in places if place[0].is_file() and not _is_library(place[0])]
    inside = [place for place in places if place[0].is_relative_to(_PACKAGE)]
    found = own or inside or places
    return f"in {found[-1][0]}, line {found[-1][1]}" if found else "from nowhere"


def _is_library(path: Path) -> bool:
    return path.is_relative_to(_PACKAGE) or path.is_relative_to(sys.base_prefix) or is_installed(path)


def _written(error: BaseException, folder: Path | None) -> str:
    """Where the traceback is."""
    text = "".join(traceback.format_exception(error))
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK")
    name = f"error-{rank}.txt" if rank else "error.txt"
    try:
        if folder is None or not folder.is_dir():
            raise FileNotFoundError
        path = folder / name
        path.write_text(text)
    except OSError:
        try:
            handle, temporary = tempfile.mkstemp(prefix="ddpm-", suffix=f"-{name}")
            with os.fdopen(handle, "w") as file:
                file.write(text)
        except OSError:
            traceback.print_exception(error)
            return "the full traceback is above, since it could be written nowhere"
        path = Path(temporary)
    return f"the full traceback is in {path}"
