"""A trained model packed into a folder: averaged weights in half precision, and a configuration without a machine."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ddpm_lightning.checkpoints.files import LAST, AtomicCheckpointIO, read_checkpoint
from ddpm_lightning.checkpoints.weights import is_finite
from ddpm_lightning.data.official import folder_inside
from ddpm_lightning.errors import InputError
from ddpm_lightning.numbers import leaves
from ddpm_lightning.runs import Run
from ddpm_lightning.training import GenerativeModule

__all__ = ["Packed"]

_RAW, _AVERAGE = "model.", "ema_model."
_HALVED = f"{_AVERAGE}network."  # the schedule and the like keep their precision
_KEY = "checkpoint"
# what a checkpoint says of the model; all else in it is the state of its training
_FACTS = ("hyper_parameters", "module", "schedule", "global_step", "epoch", "pytorch-lightning_version")


class Packed:
    """A folder with ``config.yaml`` and ``weights.safetensors``.

    The weights are the averaged ones, of the network in float16. What else a checkpoint says of its model is JSON in
    the metadata of this file.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_path, self.weights_path = folder / "config.yaml", folder / "weights.safetensors"

    @classmethod
    def of(
        cls, run: Run, folder: Path, checkpoint: str | Path = "last", dtype: torch.dtype = torch.float16
    ) -> "Packed":
        """Pack a run into ``folder``, over what is there.

        Args:
            run: whose averaged weights.
            folder: is made where it is not there.
            checkpoint: last, best or a file.
            dtype: of the network's weights.

        Raises:
            InputError: no such run or checkpoint; weights beyond the range of ``dtype``; data of the run's own machine.
        """
        config, found = _portable(run.config), read_checkpoint(run.checkpoint(checkpoint))
        weights = {}
        for name, value in found["state_dict"].items():
            if not name.startswith(_RAW):
                halves = name.startswith(_HALVED) and value.dtype == torch.float32
                weights[name] = (value.to(dtype) if halves else value).contiguous()
                if not is_finite(weights[name]):
                    raise InputError(f"{run.folder}: {name} has values beyond the range of {dtype}")
        packed = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {name: found[name] for name in _FACTS if name in found}
        packed.weights_path.write_bytes(save(weights, metadata={_KEY: json.dumps(facts)}))
        packed.config_path.write_text(yaml.safe_dump(config, sort_keys=False))
        return packed

    @cached_property
    def _contents(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safe_open(self.weights_path, "pt") as file:
                facts = json.loads(file.metadata()[_KEY])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.folder} holds no packed model: {error}") from error
        return facts, weights

    def checkpoint(self) -> dict[str, Any]:
        """What training would have written for these weights, without the state of training.

        The raw weights are the averaged ones, in the same memory.

        Raises:
            InputError: the folder holds no packed model.
        """
        facts, weights = self._contents
        averages = {
            name: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
            for name, value in weights.items()
        }
        raw = {_RAW + name.removeprefix(_AVERAGE): v for name, v in averages.items() if name.startswith(_AVERAGE)}
        return {**facts, "state_dict": {**raw, **averages}}

    def load(self) -> GenerativeModule:
        """The module, on the CPU and in evaluation mode. What the folder names is checked as a checkpoint is.

        Raises:
            InputError: a class that is not trusted, weights of another model, or no packed model at all.
        """
        return GenerativeModule.from_checkpoint(self.checkpoint(), str(self.folder)).eval()

    def lay_out(self, folder: str | Path) -> Run:
        """The run in ``folder`` with this model, made where there is none, for all that takes a run.

        Raises:
            InputError: ``folder`` holds anything else, or cannot be made.
        """
        run = Run(folder)
        if not run.folder.exists():
            try:
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                with folder_inside(run.folder.parent) as beside:
                    made = Run(beside / run.folder.name)
                    AtomicCheckpointIO().save_checkpoint(self.checkpoint(), made.checkpoints / LAST)
                    made.write("config.yaml", self.config_path.read_text())
                    os.rename(made.folder, run.folder)
            except OSError as error:
                if not run.folder.is_dir():  # else another process was faster
                    why = error.strerror or error
                    raise InputError(
                        f"{run.folder} cannot be made ({why}): work in a folder that can be written"
                    ) from None
            else:
                print(f"{self.folder.name}: laid out as a run in {folder}", flush=True)
        if not self._is_in(run):
            raise InputError(f"{run.folder} holds something else than {self.folder.name}: move it, or delete it")
        return run

    def _is_in(self, run: Run) -> bool:
        mine = self.checkpoint()
        try:
            theirs = read_checkpoint(run.checkpoints / LAST)
            same = run.config_path.read_text() == self.config_path.read_text()
        except (InputError, OSError, UnicodeDecodeError):
            return False
        of_mine, of_theirs = mine.pop("state_dict"), theirs.pop("state_dict")
        fits = same and mine == theirs and of_mine.keys() == of_theirs.keys()
        return fits and all(torch.equal(value, of_theirs[name]) for name, value in of_mine.items())


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that its model needs anywhere: no folders, no hardware, no callbacks."""
    kept: dict[str, Any] = {
        name: config[name] for name in ("seed_everything", "module", "data", "model") if name in config
    }
    arguments = dict(config["data"].get("init_args") or {})
    arguments.pop("root", None)
    kept["data"] = {**config["data"], "init_args": arguments}
    if own := [(name, value) for name, value in leaves(kept) if isinstance(value, str) and value[:1] in ("/", "~")]:
        raise InputError(f"--{own[0][0]} {own[0][1]} is a place on this machine: a model of such data cannot be packed")
    return kept
