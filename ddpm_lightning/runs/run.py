"""Reading a finished run back in."""

from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from ddpm_lightning.data import ImageDataModule
from ddpm_lightning.errors import InputError
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["load_run"]


def load_run(config: Path, ckpt_path: Path) -> tuple[DiffusionModule, ImageDataModule]:
    """The module in a run's checkpoint, on the CPU, and the data that the run's configuration names.

    Args:
        config: RUN/config.yaml.
        ckpt_path: a checkpoint of the same run.

    Raises:
        InputError: no such checkpoint, one that is damaged or refused (``checkpoint_io.py``), a file that is no
            configuration of a run.
    """
    try:
        section = yaml.safe_load(config.read_text())["data"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"--config {config} is no configuration of a run: {error!r}") from None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    data = parser.instantiate(parser.parse_object({"data": section})).data
    module = DiffusionModule.load_from_checkpoint(ckpt_path, map_location="cpu")
    return module.eval(), data
