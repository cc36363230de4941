"""The user's own modules: where they are found, and what is said where one of them fails."""

import re
import sys
import sysconfig
import traceback
from pathlib import Path

import ddpm_lightning

__all__ = ["failure_in_own_code", "find_own_modules", "is_installed"]

_NOT_OWN = [Path(folder).resolve() for folder in (sysconfig.get_path("stdlib"), *ddpm_lightning.__path__)]


def find_own_modules() -> None:
    """Let modules of the current folder be imported, after all others: one called like a library hides none."""
    here = str(Path.cwd())
    if not {"", here} & {*sys.path}:
        sys.path.append(here)


def failure_in_own_code(error: BaseException | None) -> str | None:
    """What failed in a module of the user's: file, line and message of the first cause of an exception.

    None for an exception that arose elsewhere. A module that is not there is no failure, but one that a library of the
    same name hides is.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for cause in reversed(chain):
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(cause.__traceback__)]
        if isinstance(cause, SyntaxError) and cause.filename:
            places.append((cause.filename, cause.lineno))
        if own := [place for place in places if _is_own(place[0])]:
            message = cause.msg if isinstance(cause, SyntaxError) else str(cause).strip()
            file, line = own[-1]
            return f"{file}, line {line}: {type(cause).__name__}: {message}"
        missing = re.match(r"(?:module '(\w+)' has no attribute|No module named '(\w+)\.)", str(cause))
        if missing and (hidden := _hidden(missing[1] or missing[2])):
            return hidden
    return None


def _is_own(file: str) -> bool:
    path = Path(file).resolve()
    return path.is_file() and not is_installed(path) and not any(path.is_relative_to(folder) for folder in _NOT_OWN)


def is_installed(path: Path) -> bool:
    """Whether a file belongs to an installed package: pip leaves a ``*.dist-info`` beside each, wherever it lies."""
    if {"site-packages", "dist-packages"} & {*path.parts}:
        return True
    roots = [folder for folder in map(Path, sys.path) if folder.is_absolute() and path.is_relative_to(folder)]
    root = max(roots, key=lambda folder: len(folder.parts), default=None)
    return root is not None and next(root.glob("*.dist-info"), None) is not None


def _hidden(name: str) -> str | None:
    mine, theirs = Path.cwd() / f"{name}.py", getattr(sys.modules.get(name), "__file__", None)
    mine = mine if mine.is_file() else Path.cwd() / name
    if theirs is None or not mine.exists() or Path(theirs).is_relative_to(Path.cwd()):
        return None
    return f"{mine} is hidden by a library of the same name, {theirs}: give the file another name"
