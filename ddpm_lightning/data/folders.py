"""Which pictures a folder holds, of which classes, and which of them are for training, validation and test."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ddpm_lightning.data.datamodule import SplitName
from ddpm_lightning.errors import InputError

__all__ = ["Pictures", "find_pictures"]

Files = list[tuple[Path, int]]
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_KINDS = ".png, .jpg, .bmp, .gif, .tiff, .webp"
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini", "__macosx")  # besides names that begin with a dot


@dataclass(frozen=True)
class Pictures:
    """What is in a folder."""

    files: dict[SplitName, Files]
    """Path and class of each picture, in the order of the paths, for train, val and test."""
    classes: list[str]
    """Names, in order; the folder's own where it has no subfolders."""
    skipped: "Counter[str]"
    """How many other files there are, by the ending of their names."""


def find_pictures(folder: Path, fractions: Mapping[SplitName, float]) -> Pictures:
    """The pictures below a folder; none of them is opened.

    Args:
        folder: holds pictures, or a subfolder with pictures for each class; or such a folder ``train``, and perhaps
            ``val`` and ``test``.
        fractions: what share is drawn for "val" and "test" where they have no folder, at least one picture.

    Raises:
        InputError: there is no such folder, no pictures or too few, or their layout can be read in two ways.
    """
    if not folder.exists():
        raise InputError(f"--data.path={folder} does not exist: give the folder that holds the pictures")
    if not folder.is_dir():
        raise InputError(f"--data.path={folder} is a file: give the folder that holds the pictures")
    skipped: Counter[str] = Counter()
    try:
        folders = _splits_in(folder, skipped)
        sources = {name: _by_class(path, skipped) for name, path in folders.items()}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from None
    names = [*sources["train"]]
    files: dict[SplitName, Files] = {}
    for split, source in sources.items():
        if strange := [name for name in source if name not in names]:
            raise InputError(_strange(folders[split], strange[0], folders["train"], names))
        files[split] = sorted((path, names.index(name)) for name, paths in source.items() for path in paths)
    drawn = [split for split in fractions if split not in files]
    files |= _drawn(files["train"], folders["train"], {split: fractions[split] for split in drawn})
    return Pictures(files, [name or folder.name for name in names], skipped)


def _splits_in(folder: Path, skipped: "Counter[str]") -> dict[SplitName, Path]:
    """The folders of the splits; the folder itself, as train's, where it has no such subfolders."""
    splits: tuple[SplitName, ...] = ("train", "val", "test")
    there: dict[SplitName, Path] = {name: folder / name for name in splits if (folder / name).is_dir()}
    if not there:
        return {"train": folder}
    meaning = "train, val and test in a folder of pictures are its splits"
    if "train" not in there:
        raise InputError(f"{folder} has a folder {next(iter(there))} and no folder train: {meaning}; add train")
    other = next((path for path in _walk(folder, skipped, skip=[*there.values()])), None)
    if other is not None:
        raise InputError(
            f"{folder} has a folder train, and beside it {other.relative_to(folder)}: {meaning}, and then all pictures "
            "must be in them; move it there, or give a class of this name another one"
        )
    return there


def _by_class(folder: Path, skipped: "Counter[str]") -> dict[str, list[Path]]:
    """Pictures by the subfolder of ``folder`` in which they are, anywhere below; by "" those outside of any."""
    found: dict[str, list[Path]] = {}
    empty: list[Path] = []
    for entry in _visible(folder):
        if entry.is_dir():
            pictures = [*_walk(Path(entry), skipped)]
            if pictures:
                found[entry.name] = pictures
            else:
                empty.append(Path(entry))
        elif _is_picture(entry.name, skipped):
            found.setdefault("", []).append(Path(entry))
    if not found:
        others = f", only {next(iter(skipped))} files" if skipped else ""
        raise InputError(f"{folder} holds no pictures ({_KINDS}){others}: put them there, or set --data.path")
    classes = [name for name in found if name]
    if classes and "" in found:
        raise InputError(
            f"{folder} holds pictures, as {found[''][0].name}, and folders of pictures, as {classes[0]}: a folder is a "
            "class, so put all pictures into one, or none"
        )
    if classes and empty:
        raise InputError(f"{empty[0]} holds no pictures ({_KINDS}): a folder is a class; fill it or move it away")
    return found


def _walk(
    folder: Path, skipped: "Counter[str]", skip: Collection[Path] = (), above: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """All pictures below a folder, but in the folders ``skip``."""
    real = folder.resolve()
    if real in above:
        raise InputError(f"{folder} is a link to a folder around it: move it away")
    for entry in _visible(folder):
        path = Path(entry)
        if entry.is_dir():
            if path not in skip:
                yield from _walk(path, skipped, above=(*above, real))
        elif _is_picture(entry.name, skipped):
            yield path


def _visible(folder: Path) -> "list[os.DirEntry[str]]":
    with os.scandir(folder) as entries:
        seen = [each for each in entries if not (each.name.startswith(".") or each.name.lower() in _OF_THE_SYSTEM)]
    return sorted(seen, key=lambda each: each.name)


def _is_picture(name: str, skipped: "Counter[str]") -> bool:
    suffix = os.path.splitext(name)[1].lower()
    if suffix in _SUFFIXES:
        return True
    skipped[suffix or "without an ending"] += 1
    return False


def _strange(folder: Path, name: str, train: Path, names: list[str]) -> str:
    if not name or names == [""]:
        with_, without = (train, folder) if not name else (folder, train)
        return f"{with_} has a folder for each class and {without} has none: lay out both in one way"
    return f"{folder} has a class {name} and {train} has none: it has {', '.join(names[:5])}"[:400]


def _drawn(train: Files, folder: Path, fractions: Mapping[SplitName, float]) -> dict[SplitName, Files]:
    """The pictures of "train" without what is drawn from them, and what is drawn, for each split in ``fractions``.

    The pictures in the order of a hash of their names: the first are drawn. So a draw needs no seed, is the same on
    every machine, and hardly changes where pictures are added.
    """
    counts = {split: max(1, round(fraction * len(train))) for split, fraction in fractions.items()}
    left = len(train) - sum(counts.values())
    if left < 1:
        drawn = " and ".join(f"{count} for {split}" for split, count in counts.items())
        have = "1 picture" if len(train) == 1 else f"{len(train)} pictures"
        raise InputError(
            f"{folder} holds {have}, of which {drawn} leave none to train on: add pictures, or lower "
            "--data.val_fraction and --data.test_fraction"
        )
    order = sorted(train, key=lambda file: _hash(file[0].relative_to(folder)))
    files: dict[SplitName, Files] = {}
    for split, count in sorted(counts.items()):
        files[split], order = sorted(order[:count]), order[count:]
    return {**files, "train": sorted(order)}


def _hash(path: Path) -> bytes:
    # a letter with an accent is one character on one system and two on another
    name = unicodedata.normalize("NFC", path.as_posix())
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
