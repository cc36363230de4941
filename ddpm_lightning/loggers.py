"""Loggers of a configuration: the packages that they need, and folders within the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ddpm_lightning.errors import InputError

__all__ = ["in_run"]

_PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}


@contextmanager
def in_run(trainer: Namespace, folder: Path) -> Iterator[None]:
    """While the context is open, a logger of a configuration that names no place keeps its files in the run's folder.

    Lightning's WandbLogger would write into the current folder, and MLFlowLogger into a server's or the current one.
    ``fast_dev_run`` takes the default one, which Lightning lets write nothing.

    Args:
        trainer: the Trainer's options in a configuration, changed in place and put back: the run may be moved.
        folder: the run's.

    Raises:
        InputError: a logger whose package is not installed.
    """
    logger = trainer.get("logger")
    changed: list[tuple[Namespace, dict[str, Any]]] = []
    for each in logger if isinstance(logger, list) else [logger]:
        if not isinstance(each, Namespace) or "class_path" not in each:
            continue
        name, arguments = each.class_path.rpartition(".")[2], each.get("init_args") or Namespace()
        if name in _PACKAGES and find_spec(_PACKAGES[name]) is None:
            raise InputError(
                f"--trainer.logger {name} needs the package {_PACKAGES[name]}: pip install 'ddpm-lightning[loggers]'"
            )
        changed.append((arguments, dict(vars(arguments))))
        if name == "WandbLogger" and arguments.save_dir == "." and not arguments.dir:
            arguments.save_dir = str(folder)
        if name == "MLFlowLogger" and not arguments.tracking_uri and arguments.save_dir == "./mlruns":
            arguments.tracking_uri = f"sqlite:///{folder / 'mlflow.db'}"
            arguments.artifact_location = arguments.artifact_location or str(folder / "mlflow")
    trainer.logger = None if trainer.get("fast_dev_run") and logger else logger
    try:
        yield
    finally:
        trainer.logger = logger
        for arguments, before in changed:
            for key, value in before.items():
                arguments[key] = value
