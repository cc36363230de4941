"""A run is a folder: the configuration, the checkpoints, the logs and the results of one training."""

import json
import os
import tempfile
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from ddpm_lightning.checkpoints.files import LAST, last_good
from ddpm_lightning.configuration import read
from ddpm_lightning.data.own import instantiate_data
from ddpm_lightning.errors import InputError
from ddpm_lightning.figures import save_png
from ddpm_lightning.runs.disk import disk_error
from ddpm_lightning.runs.lock import hold
from ddpm_lightning.training import DiffusionModule, GenerativeModule

__all__ = ["Run"]


class Run:
    """The folder that ``ddpm fit`` writes, and the way back into it::

        module, data = Run("runs/mnist").load()

    Args:
        folder: relative to the current folder or absolute; ``~`` is the home folder. It need not exist yet.

    Raises:
        InputError: an empty name.
    """

    def __init__(self, folder: str | Path) -> None:
        if not str(folder).strip():
            raise InputError('run_dir "" is no folder: name one, for example --run_dir runs/mnist')
        self.folder = Path(folder).expanduser().absolute()

    @classmethod
    def of(cls, trainer: Trainer) -> "Run":
        """The run that a Trainer works in."""
        return cls(trainer.default_root_dir)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def config_path(self) -> Path:
        return self.folder / "config.yaml"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of ``fit`` with every default spelled out.

        Raises:
            InputError: there is none, or it is not the configuration of a run.
        """
        try:
            config = read(self.config_path)
        except InputError as error:
            raise InputError(f"{self.folder} holds no run: {error}") from None
        if not isinstance(config.get("data"), dict):
            raise InputError(f"{self.config_path} is not the configuration of a run: it names no data")
        return config

    def make(self) -> None:
        """Make the folder. Raises InputError if it cannot be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise InputError(
                f"--run_dir {self.folder} cannot be written to ({error.strerror}): choose another folder"
            ) from None

    def lock(self) -> AbstractContextManager[None]:
        """Held while training: a second training in the folder is refused with an InputError."""
        return hold(self.folder / ".lock", "is being trained in")

    def checkpoint(self, which: str | Path = "last") -> Path:
        """The path of a checkpoint that can be read.

        Args:
            which: ``last``, ``best``, or a path.

        Returns:
            The path. Where only ``previous.ckpt`` is left of ``last.ckpt``, the path of ``last.ckpt``: its readers then
            take the other and say so.

        Raises:
            InputError: there is no such file.
        """
        path = self.checkpoints / f"{which}.ckpt" if which in ("last", "best") else Path(which).expanduser().absolute()
        if path.is_file() or (path.name == LAST and last_good(path.parent)):
            return path
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} holds no run: there is no such folder")
        known = sorted(map(str, self.checkpoints.glob("*.ckpt")))
        hint = f"this run has {', '.join(known)}" if known else f"there is none in {self.checkpoints} either"
        raise InputError(f"the checkpoint {path} does not exist; {hint}")

    def newest_checkpoint(self) -> Path | None:
        """From where training goes on: ``last.ckpt``, or the file written last where it is missing; None for none."""
        if last_good(self.checkpoints):
            return self.checkpoints / LAST
        return max(self.checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)

    def load(self, checkpoint: str | Path = "last") -> tuple[GenerativeModule, LightningDataModule]:
        """The trained module, on the CPU and in evaluation mode, and the data that it was trained on.

        Raises:
            InputError: no such checkpoint, a damaged or refused one, no configuration.
        """
        return self.load_module(checkpoint), self.load_data()

    def load_module(self, checkpoint: str | Path = "last") -> GenerativeModule:
        """The module alone; needs a checkpoint and no configuration."""
        return GenerativeModule.load_from_checkpoint(self.checkpoint(checkpoint), map_location="cpu").eval()

    def load_diffusion(self, checkpoint: str | Path = "last") -> DiffusionModule:
        """The module alone, of a run that trained a diffusion model; InputError for another run."""
        return DiffusionModule.load_from_checkpoint(self.checkpoint(checkpoint), map_location="cpu").eval()

    def load_data(self) -> LightningDataModule:
        """The data alone; needs the configuration and no checkpoint."""
        return instantiate_data(self.config["data"])

    def write(self, name: str, content: str | dict[str, Any] | list[Any] | Tensor) -> Path:
        """Write a file into the folder, whole or not at all.

        Args:
            name: its name; folders within the run are made.
            content: text, plain data (written as JSON), or a picture, uint8 ``[3, height, width]`` (written as PNG).

        Returns:
            The path.

        Raises:
            RunError: the disk is full, for example.
        """
        path = self.folder / name
        part = path.with_name(f".{path.stem}.part{path.suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Tensor):
                save_png(content, part)
            else:
                part.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
            os.replace(part, path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise disk_error(error, self.folder, path) from error
        return path
