"""Projects of the user's own: ``ddpm new`` writes one from the templates beside this file."""

import importlib.metadata
import importlib.util
import keyword
import os
import re
import sys
import tempfile
from pathlib import Path
from string import Template

import numpy as np

from ddpm_lightning import __version__
from ddpm_lightning.errors import InputError

__all__ = ["new"]

_TEMPLATES = Path(__file__).parent / "template"
_SUFFIX = ".template"
_FOLDERS = ("configs", "tests", "runs")  # of the project itself
_RANGES = {"channels": (1, 16), "size": (4, 128)}
_PICTURES = 640


def new(project: str, channels: int = 1, size: int = 8) -> None:
    """Start a project of your own: a package with a class of data, a network, a configuration and a test.

    The project runs at once, on pictures that are made for it. Nothing is overwritten.

    Args:
        project: the folder that is made; its last part names the package
        channels: of the pictures
        size: height and width of the pictures
    """
    for name, value in (("channels", channels), ("size", size)):
        least, most = _RANGES[name]
        if not least <= value <= most:
            raise InputError(
                f"--{name} {value} must lie between {least} and {most}: it is of the example's pictures, not of yours"
            )
    folder = Path(project).expanduser()
    name = folder.name
    _check_name(name, project)
    _check_place(folder)
    if name in sys.stdlib_module_names or _is_installed(name):
        raise InputError(f"{name} is the name of an installed package, which would be hidden: take another name")
    known = re.match(r"\d+\.\d+\.\d+", __version__)
    values = {
        "name": name,
        "channels": str(channels),
        "size": str(size),
        "requirement": "ddpm-lightning" + (f">={known[0]}" if known else ""),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder.parent) as beside:
            _write(made := Path(beside) / name, values)
            os.rename(made, folder)  # which takes the place of an empty folder only
    except OSError as error:
        raise InputError(f"{project} cannot be made: {error.strerror or error}") from None
    print(
        f"{folder}: a package {name}, its configuration, a test and {_PICTURES} pictures. Next:\n\n"
        f"  cd {folder}\n  python -m pytest\n  ddpm fit -c configs/default.yaml\n  ddpm sample runs/default --n 16\n\n"
        "README.md says what to replace by your own."
    )


def _check_name(name: str, project: str) -> None:
    """Refuse what cannot be imported."""
    # the name of a distribution begins and ends with a letter or a digit
    if not re.fullmatch(r"[A-Za-z](\w*[A-Za-z0-9])?", name, re.ASCII):
        fitting = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_0123456789")
        such = f", such as {fitting}" if re.fullmatch(r"[A-Za-z]\w*", fitting, re.ASCII) else ""
        raise InputError(f"{project or repr(project)} cannot name a package: take letters, digits and _{such}")
    if keyword.iskeyword(name):
        raise InputError(f"{name} is a word of Python and cannot name a package: take another name")
    if name.lower() in _FOLDERS:
        raise InputError(f"{name} is the name of a folder in each project: take another name")


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        found = importlib.util.find_spec(name)
        return found is not None and found.origin is not None  # None for a folder without modules
    return True


def _check_place(folder: Path) -> None:
    """Refuse a place where something is."""
    try:
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise InputError(f"{folder} is there already, and is no folder: take another name")
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is there already, and is not empty: take another name, or empty the folder")
        for parent in folder.parents:
            if parent.exists() and not parent.is_dir():
                raise InputError(f"{folder} cannot be made: {parent} is no folder")
    except OSError as error:
        raise InputError(f"{folder} cannot be looked at: {error.strerror}") from None


def _write(folder: Path, values: dict[str, str]) -> None:
    for source in sorted(_TEMPLATES.rglob(f"*{_SUFFIX}")):
        place = source.relative_to(_TEMPLATES).as_posix().removesuffix(_SUFFIX)
        # a file that begins with a dot is easily left out of a distribution
        place = ".gitignore" if place == "gitignore" else re.sub("^package/", f"{values['name']}/", place)
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(source.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")
    images, labels = _stripes(int(values["channels"]), int(values["size"]))
    np.savez_compressed(folder / "pictures.npz", images=images, labels=labels)


def _stripes(channels: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 ``[N, C, H, W]`` of plane waves of any phase, and their classes int64 ``[N]``: 0 where the waves
    run down the picture, 1 where they run across."""
    rng = np.random.default_rng(0)
    labels = np.arange(_PICTURES, dtype=np.int64) % 2
    phase = rng.uniform(0, 2 * np.pi, (_PICTURES, channels, 1))
    waves = np.cos(4 * np.pi * np.arange(size) / size + phase)
    pictures = np.broadcast_to(waves[:, :, None, :], (_PICTURES, channels, size, size)).copy()
    pictures[labels == 0] = pictures[labels == 0].swapaxes(2, 3)
    return np.rint(127.5 + 100 * pictures + rng.normal(0, 4, pictures.shape)).clip(0, 255).astype(np.uint8), labels
