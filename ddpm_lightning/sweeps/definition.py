"""What a sweep is: the file that describes it, and what a sweep that has begun keeps of this file."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ddpm_lightning.configuration import read, shipped
from ddpm_lightning.errors import InputError
from ddpm_lightning.runs import Run
from ddpm_lightning.sweeps.space import LARGEST_GRID, Option, read_space, refuse_own, short_name, word

__all__ = ["FILE", "Definition"]

FILE = "definition.yaml"
"""Name of the file in the folder of a sweep that has begun."""

_SAMPLERS = ("tpe", "random", "grid")
_PRUNERS = ("median", "halving", "none")
_MODES = ("min", "max")


@dataclass(frozen=True)
class Definition:
    """A sweep.

    Attributes:
        run_dir: its folder.
        configs: the configurations of the trainings, as they were read.
        options: words of the command line that all trainings share.
        space: the options that differ, by name.
        trials: number of trainings.
        monitor: name of what is compared; None for what the run's checkpoint callback monitors.
        mode: min or max of it; None for the checkpoint callback's.
        sampler: how values are chosen: tpe, random or grid.
        pruner: which trainings are stopped early: median, halving or none.
        prune_after: number of complete trials before one is stopped early.
        prune_from: number of validations of a trial before it is stopped early.
        seed: of the choice of values.
    """

    run_dir: Path
    configs: tuple[dict[str, Any], ...]
    options: tuple[str, ...]
    space: dict[str, Option]
    trials: int = 20
    monitor: str | None = None
    mode: str | None = None
    sampler: str = "tpe"
    pruner: str = "median"
    prune_after: int = 5
    prune_from: int = 1
    seed: int = 0

    @classmethod
    def read(cls, path: Path, words: list[str], folder: Path | None = None) -> "Definition":
        """The sweep of a file, with more words of the command line; ``folder`` is that of a sweep that has begun.

        Raises:
            InputError: no such file, a key or a value that there is not.
        """
        loaded = read(path)
        known = {"config", *(field.name for field in fields(cls))} - {"configs"}
        for key in loaded:
            if key not in known:
                near = get_close_matches(str(key), known, 1)
                meant = f": did you mean {near[0]}?" if near else f": there are {', '.join(sorted(known))}"
                raise InputError(f"{path}: a sweep has no key {key}{meant}")
        if "config" not in loaded:
            raise InputError(f"{path} is no sweep: it has no config, which names the configuration of the trainings")
        named, kept = loaded.pop("config"), loaded.pop("options", [])
        names = named if isinstance(named, list) else [named]
        shared = shlex.split(kept) if isinstance(kept, str) else kept
        if not all(isinstance(each, str) for each in [*names, *(shared if isinstance(shared, list) else [None])]):
            raise InputError(f"{path}: config must name files, and options be words of the command line")
        more, words = _split([*shared, *words])
        configs = tuple(read(_found(name, path)) for name in [*names, *more])
        run_dir = loaded.pop("run_dir", f"sweeps/{path.stem}")
        if not isinstance(run_dir, str):
            raise InputError(f"{path}: run_dir must be the name of a folder")
        space = read_space(loaded.pop("space", None), str(path))
        _check_values(loaded, str(path))
        if loaded.get("sampler") == "grid":
            points = math.prod(len(option.points(f"{path}: space: {name}")) for name, option in space.items())
            if points > LARGEST_GRID:
                raise InputError(f"{path}: a grid of {points:,} points is too large: take another sampler")
        for each in words:
            option = each.partition("=")[0].removeprefix("--")
            if each.startswith("--") and short_name(option) in map(short_name, space):
                raise InputError(f"--{option} is given for all trials, and is in space too: leave one out")
        return cls(Run(folder or run_dir).folder, configs, tuple(words), space, **loaded)

    def save(self) -> None:
        """Write the file and its configurations into the folder, from which :meth:`read` makes the same again."""
        plain: dict[str, Any] = {"config": self.write_configs(self.run_dir), "options": [*self.options]}
        plain |= {field.name: getattr(self, field.name) for field in fields(self)[4:]}
        plain["space"] = {
            name: dict(vars(option)) if hasattr(option, "low") else [*option.values]
            for name, option in self.space.items()
        }
        for given in plain["space"].values():
            if isinstance(given, dict) and given["step"] is None:
                del given["step"]
        plain = {key: value for key, value in plain.items() if value is not None}
        Run(self.run_dir).write(FILE, yaml.safe_dump(plain, sort_keys=False))

    def write_configs(self, folder: str | Path) -> list[str]:
        """Write the configurations into a folder, and return the names of the files."""
        for name, config in zip(self._names(), self.configs, strict=True):
            Run(folder).write(name, yaml.safe_dump(config, sort_keys=False))
        return self._names()

    def _names(self) -> list[str]:
        return [f"base{number or ''}.yaml" for number in range(len(self.configs))]

    def differs(self, other: "Definition") -> str | None:
        """The first thing in which two sweeps are not the same, if any; the folder and ``trials`` may differ."""
        names = [field.name for field in fields(self) if field.name not in ("run_dir", "trials")]
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)

    def command(self, values: Mapping[str, Any], run_dir: str, folder: str | Path) -> list[str]:
        """Words of ``ddpm`` for a training with these values; ``folder`` is where the configurations are."""
        configs = [part for name in self._names() for part in ("-c", str(Path(folder) / name))]
        chosen = [part for name, value in values.items() for part in (f"--{name}", word(value))]
        return ["fit", *configs, *self.options, *chosen, "--run_dir", run_dir]

    def trial(self, values: Mapping[str, Any], run_dir: Path, folder: Path) -> list[str]:
        """The same for a trial, on one device; a run that was begun before goes on."""
        words = [*self.command(values, str(run_dir), folder), "--ckpt_path", "last"]
        is_given = any(each.partition("=")[0] == "--trainer.devices" for each in words)
        return words if is_given else [*words, "--trainer.devices", "1"]


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The configurations that words name, and the other words."""
    configs, others = [], []
    parts = [part for each in words for part in (each.split("=", 1) if each.startswith("--config=") else [each])]
    follows = False
    for before, part in pairwise(["", *parts]):
        if before in ("-c", "--config") and follows:
            configs.append(part)
            follows = False
        elif part in ("-c", "--config"):
            follows = True
        else:
            others.append(part)
            if part.startswith("--"):
                refuse_own(part.partition("=")[0].removeprefix("--"), "options")
    if follows:
        raise InputError("--config needs the name of a file")
    return configs, others


def _found(name: str, sweep: Path) -> Path:
    """The file of a configuration: beside the sweep's own, in the current folder, or one that is shipped."""
    beside, ours = sweep.parent / name, shipped(name)
    found = [path for path in (beside, Path(name).expanduser()) if path.is_file()]
    return found[0] if found else ours or Path(name)


def _check_values(given: dict[str, Any], file: str) -> None:
    for key, known in (("sampler", _SAMPLERS), ("pruner", _PRUNERS), ("mode", _MODES)):
        if given.get(key) is not None and given[key] not in known:
            raise InputError(f"{file}: {key}: {given[key]} must be one of {', '.join(known)}")
    if not isinstance(given.get("monitor"), str | None):
        raise InputError(f"{file}: monitor must be the name of what is compared, as val/denoising/bits_per_dim")
    for key, least in (("trials", 1), ("prune_after", 1), ("prune_from", 1), ("seed", 0)):
        value = given.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32:
            raise InputError(f"{file}: {key}: {value} must be a whole number, {least} or more")
