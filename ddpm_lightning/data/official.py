"""Data sets of official files: read where torchvision keeps them, and fetched with it where they are missing."""

import contextlib
import http.client
import io
import os
import socket
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor

from ddpm_lightning.data.batches import Split
from ddpm_lightning.data.datamodule import ImageDataModule, SplitName
from ddpm_lightning.errors import InputError

__all__ = ["REMEDY", "OfficialData", "folder_inside"]

REMEDY = "Delete it and run again (--data.download=true fetches it anew), or put a good copy there"

_DOWNLOAD_TIMEOUT_S = 30.0


class OfficialData(ImageDataModule):
    """Official training and test images, untouched, in files below ``root``.

    The validation images are drawn from the training images once and for all: for a given val_size they are the same
    in every run, and a larger val_size adds images to them.

    Args:
        root: folder that holds ``folder`` with the files. Nothing is written to it when they are there.
        val_size: how many of the training images are set aside for validation, at least 1, and not all.
        download: fetch the files on first use when they are missing.
    """

    title: ClassVar[str]
    """The data set's name, and that of its class in torchvision."""
    folder: ClassVar[str]
    """Where the files are, below ``root``, as in torchvision."""
    train_files: ClassVar[tuple[str, ...]]
    test_files: ClassVar[tuple[str, ...]]
    train_size: ClassVar[int]
    test_size: ClassVar[int]
    megabytes: ClassVar[int]
    """Of the download."""

    def __init__(self, root: str = "data", val_size: int = 5_000, download: bool = True, **kwargs: Any) -> None:
        if not isinstance(val_size, int) or not 1 <= val_size < self.train_size:
            raise InputError(f"--data.val_size={val_size!r} must be a whole number from 1 to {self.train_size - 1}")
        super().__init__({"train": self.train_size - val_size, "val": val_size, "test": self.test_size}, **kwargs)
        self.root, self.val_size, self.download = root, val_size, download

    @property
    def raw(self) -> Path:
        """The folder of the files, absolute."""
        return (Path(self.root).expanduser() / self.folder).resolve()

    def prepare_data(self) -> None:
        """Unpack or download what is missing, and check all files; InputError where that fails."""
        everything = [*self.train_files, *self.test_files]
        if missing := self._missing(everything):
            self._unpack(missing)
        missing = self._missing(everything)
        # before the download: a damaged file is the user's to mend, with or without network
        self._check_files([name for name in everything if name not in missing])
        if missing and not self.download:
            raise self._missing_error(missing, "and --data.download=false forbids fetching them")
        if missing:
            self._fetch(missing)
            self._check_files(missing)

    def load(self, split: SplitName) -> Split:
        names = self.test_files if split == "test" else self.train_files
        if missing := self._missing(names):
            raise self._missing_error(missing, "and prepare_data() was not run on this machine")
        images, labels = self._read(names)
        if split == "test":
            return Split(images, labels)
        # Not an option: results of different runs are comparable only on the same split.
        order = torch.randperm(self.train_size, generator=torch.Generator().manual_seed(self.train_size))
        rows = order[: self.val_size] if split == "val" else order[self.val_size :]
        return Split(images[rows], labels[rows])

    def _unpack(self, missing: list[str]) -> None:
        """Make of packed files, where there are any, those that are missing."""
        raise NotImplementedError

    def _check_files(self, names: list[str]) -> None:
        """InputError for a file that is damaged or another one."""
        raise NotImplementedError

    def _read(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Images uint8 ``[N, C, H, W]`` and labels int64 ``[N]`` of files that are there, in their order, checked."""
        raise NotImplementedError

    def _missing(self, names: tuple[str, ...] | list[str]) -> list[str]:
        return [name for name in names if not (self.raw / name).exists()]

    def _missing_error(self, missing: list[str], why: str) -> InputError:
        return InputError(
            f"{self.title} files are missing: {', '.join(missing)}. Looked in {self.raw} (--data.root={self.root}), "
            f"{why}. Put them there, set --data.root to the folder that holds {self.folder}, or run on the embedded "
            "digits instead: -c configs/digits.yaml"
        )

    def _fetch(self, missing: list[str]) -> None:
        print(f"downloading {self.title} ({self.megabytes} MB) to {self.raw}", file=sys.stderr, flush=True)
        made = [folder for folder in (self.raw, *self.raw.parents) if not folder.exists()]
        try:
            self.raw.mkdir(parents=True, exist_ok=True)
            # torchvision writes straight to its target and takes any file of the right name for a whole one. So it
            # gets a folder of its own, and only whole files (it compares the md5) move to the real one.
            with folder_inside(self.raw) as folder, _quiet_and_impatient():
                getattr(torchvision.datasets, self.title)(str(folder), download=True)
                for name in missing:
                    os.replace(folder / self.folder / name, self.raw / name)
        except (OSError, RuntimeError, EOFError, zlib.error, http.client.HTTPException) as error:
            with contextlib.suppress(OSError):  # one that holds files stays
                for folder in made:
                    folder.rmdir()
            why = " ".join(str(error).split()) or type(error).__name__
            raise self._missing_error(missing, f"and the download failed ({why})") from None


@contextlib.contextmanager
def folder_inside(parent: Path) -> Iterator[Path]:
    """A passing folder on the same disk as ``parent``, so that a move from it to there is atomic."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=parent) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _quiet_and_impatient() -> Iterator[None]:
    """No progress bars on stderr, and an unanswered connection fails instead of hanging for ever."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)
