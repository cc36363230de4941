"""The words of a command line before they are parsed: a run or a packed model in the place of options."""

import logging
import warnings
from collections.abc import Container
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from ddpm_lightning.configuration import configuration_files
from ddpm_lightning.errors import InputError
from ddpm_lightning.pretrained import lay_out_pretrained
from ddpm_lightning.runs import Run

__all__ = ["folder_of", "of_a_run", "quieten", "refuse_late_command", "with_pretrained"]

_NOISE = (
    "treespec, LeafSpec",
    # the arguments are the command line's, with RUN spelled out
    "args parameter is intended to run from within Python",
    # meant for DataLoaders: each batch of ours carries its indices
    "infer the batch indices",
    # a checkpoint of fit is tested without the callbacks of fit
    "callbacks used to create the checkpoint need to be provided",
    # a run's folder may be moved, and gone on with
    "The dirpath has changed",
    "Checkpoint directory .* exists and is not empty",
    # the averaged model is only ever evaluated
    "in eval mode at the start of training",
    # the scores of the bound are equal on all processes when they are logged
    "sync_dist=True",
    # before the first validation; after one it is an error
    "could not find the monitored key in the returned metrics",
    # all inputs of an ONNX graph have one number of images
    "The axis name: batch will not be used",
)


def quieten() -> None:
    """Silence what a user can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def of_a_run(args: list[str], commands: Container[str]) -> list[str]:
    """``ddpm test RUN ...`` spelled out; and a configuration that lies in a run's folder means that run.

    Args:
        args: the words of a command line.
        commands: those that take a RUN in this way.
    """
    command, *rest = args or [""]
    if command in commands and rest and not rest[0].startswith("-"):
        run = Run(rest[0])
        run.config  # noqa: B018  # refuses a folder that holds no run
        words = [command, "-c", str(run.config_path), "--ckpt_path", "last", *rest[1:]]
        named = any(word.split("=")[0] == "--run_dir" for word in rest[1:])
        # behind further configurations, which name a run_dir of their own
        return words if named else [*words, "--run_dir", str(run.folder)]
    if not any(word.split("=")[0] == "--run_dir" for word in rest):
        for option, value in pairwise(rest):
            run = Run(Path(value or ".").parent)
            of_run = Path(value).name == "config.yaml" and run.checkpoints.is_dir()
            if option in ("-c", "--config") and of_run:
                return [*args, "--run_dir", str(run.folder)]
    return args


def with_pretrained(words: list[str]) -> list[str]:
    """``--pretrained NAME`` in the place of RUN: the model becomes a run, which all commands know."""
    split = [part for word in words for part in (word.split("=", 1) if word.startswith("--pretrained=") else [word])]
    if "--pretrained" not in split:
        return words
    if split.count("--pretrained") > 1:
        raise InputError("give --pretrained NAME once: a command takes one model")
    at = split.index("--pretrained")
    name, rest = "".join(split[at + 1 : at + 2]), split[:at] + split[at + 2 :]
    if rest[:1] == ["fit"]:
        raise InputError(
            "fit --pretrained: training cannot go on from averaged weights alone; start a run with -c CONFIG"
        )
    if rest[:1] == ["submit"]:
        raise InputError(
            f"submit --pretrained: ddpm sample --pretrained {name} --n 1 lays the model out as the run "
            f"runs/pretrained/{name}, which submit takes as RUN"
        )
    if rest[:1] == ["new"]:
        raise InputError("new --pretrained: a project begins without a model; ddpm new PROJECT")
    place = 2 if rest[:1] == ["evaluate"] else 1
    if rest[place : place + 1] and not rest[place].startswith("-"):
        raise InputError(f"give RUN or --pretrained NAME, not both {rest[place]} and {name}")
    return [*rest[:place], str(lay_out_pretrained(name).folder), *rest[place:]]


def refuse_late_command(words: list[str], commands: Container[str]) -> None:
    """Refuse options that stand before the command; InputError."""
    late = next((word for word in words if word in commands), None)
    if words[:1] and words[0].startswith("-") and late:
        others = " ".join(word for word in words if word != late)
        raise InputError(f"write the command first: ddpm {late} {others}")


def folder_of(args: list[str]) -> Path | None:
    """The run's folder that a command line names, if any."""
    words = [word for each in args for word in each.split("=", 1)]
    named = [value for option, value in pairwise(words) if option == "--run_dir"]
    if not named and words[1:] and not words[1].startswith("-"):
        named = [words[2] if words[0] == "evaluate" and words[2:] else words[1]]
    if not named:
        with suppress(Exception):  # what stopped the program may be one of these files
            named = [str(loaded["run_dir"]) for loaded in configuration_files(args) if "run_dir" in loaded]
    return Path(named[-1]).expanduser() if named else None
