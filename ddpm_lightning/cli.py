"""The command line: ``ddpm fit | validate | test | predict | sample``."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

# named here, so that a configuration can write MNIST for ddpm_lightning.data.MNIST, and so on
from ddpm_lightning.data import ImageDataModule
from ddpm_lightning.errors import InputError
from ddpm_lightning.training import DiffusionModule, DiffusionTrainer
from ddpm_lightning.training.callbacks import BoundTable, EpochLines, ImageTermsWriter

__all__ = ["DiffusionCLI", "main"]

_PARSER_MODE = "yaml_extends"


def _merge(base: Any, overlay: Any) -> Any:
    """Overlay on base, key by key. A part of another class, like a list, replaces the base's as a whole."""
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    if "class_path" in overlay and overlay["class_path"] != base.get("class_path"):
        return overlay
    merged = {**base, **{key: _merge(base.get(key), value) for key, value in overlay.items()}}
    return merged


def _load_extending(text: str) -> Any:
    """YAML in which ``extends: other.yaml`` (beside this file) names the configuration that this one changes."""
    loaded = get_loader("yaml")(text)
    if not (isinstance(loaded, dict) and "extends" in loaded):
        return loaded
    # jsonargparse parses a configuration file in that file's own folder
    base = Path(str(loaded.pop("extends")))
    try:
        return _merge(_load_extending(base.read_text()), loaded)
    except OSError as error:
        raise yaml.YAMLError(f"extends: {base.resolve()}: {error.strerror}") from None


set_loader(_PARSER_MODE, _load_extending, exceptions=(yaml.YAMLError,))


class _SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration in the run's folder: config.yaml of fit, config-STAGE.yaml of the others."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self.config_filename = f"config-{stage}.yaml"
        super().setup(trainer, pl_module, stage)


class DiffusionCLI(LightningCLI):
    """LightningCLI with a run folder, links from the data to the model, ``sample``, and errors of one sentence."""

    def __init__(self, args: list[str] | None = None) -> None:
        # abbreviations would turn a misspelt option into another one
        parser_kwargs: dict[str, Any] = {"parser_mode": _PARSER_MODE, "allow_abbrev": False}
        super().__init__(
            DiffusionModule,
            ImageDataModule,
            trainer_class=DiffusionTrainer,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={
                **parser_kwargs,
                # argparse's own usage is a page of 80 options before the one line of the error
                **{name: {**parser_kwargs, "usage": f"ddpm {name} [options]"} for name in self.subcommands()},
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's four subcommands and ``sample``."""
        # left out: Lightning's own table of results, and predictions that nothing would receive
        left_out = {"validate": {"verbose"}, "test": {"verbose"}, "predict": {"return_predictions"}}
        lightning = {name: skip | left_out.get(name, set()) for name, skip in LightningCLI.subcommands().items()}
        return {**lightning, "sample": {"model", "datamodule"}}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "verbose": False} if subcommand in ("validate", "test") else kwargs

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, and what the model takes from the data."""
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Folder for all that the run writes.")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("data.shape", "model.shape", apply_on="instantiate")
        parser.link_arguments("data.levels", "model.levels", apply_on="instantiate")
        parser.link_arguments("data.levels", "model.decoder.init_args.levels", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Leave the command line alone: what it says beats what a checkpoint remembers."""

    def before_instantiate_classes(self) -> None:
        """Look at the run folder and the checkpoint before anything is built or loaded."""
        config = self.config[self.subcommand]
        run_dir = Path(config.run_dir)
        checkpoints = run_dir / "checkpoints"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            probe = run_dir / ".write-test"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(
                f"--run_dir {run_dir} cannot be written to ({error.strerror}): choose another folder"
            ) from None
        ckpt_path = config.get("ckpt_path")
        if ckpt_path in ("last", "best"):
            ckpt_path = config["ckpt_path"] = str(checkpoints / f"{ckpt_path}.ckpt")
        known = sorted(str(path) for path in checkpoints.glob("*.ckpt"))
        if ckpt_path is not None and ckpt_path != "hpc" and not Path(ckpt_path).is_file():
            hint = f"this run has {', '.join(known)}" if known else f"there is none in {checkpoints} either"
            raise InputError(f"--ckpt_path {ckpt_path} does not exist; {hint}")
        if self.subcommand == "fit" and ckpt_path is None and known and not config.trainer.fast_dev_run:
            raise InputError(
                f"{run_dir} already holds a run ({checkpoints}). Go on with it: --ckpt_path last. "
                "Start another: --run_dir FOLDER"
            )

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; bad arguments become an InputError.

        Raises:
            InputError: a part refused its arguments.
        """
        try:
            super().instantiate_classes()
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with TensorBoard in the run folder, and progress that fits where it is shown."""
        terminal = sys.stdout.isatty() and self.subcommand != "sample"
        callbacks = self.config_init[self.subcommand].trainer.callbacks or []
        if not terminal:
            kwargs["enable_progress_bar"] = False
        elif not any(isinstance(callback, RichProgressBar) for callback in callbacks):
            callbacks = [*callbacks, RichProgressBar(leave=False)]
        kwargs["callbacks"] = [*callbacks, BoundTable(), ImageTermsWriter(), *([] if terminal else [EpochLines()])]
        config = self.config_init[self.subcommand].trainer
        if config.logger is None or config.logger is True:
            writes = self.subcommand in ("fit", "validate", "test")
            kwargs["logger"] = (
                TensorBoardLogger(config.default_root_dir, name="", version="", default_hp_metric=False)
                if writes
                else False
            )
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Say where everything is."""
        if self.trainer.is_global_zero and self.trainer.checkpoint_callback is not None:
            print(f"run folder: {self.trainer.default_root_dir}", flush=True)


def _quieten() -> None:
    """Silence what a user can do nothing about."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    # meant for DataLoaders: each batch of ours carries its indices
    warnings.filterwarnings("ignore", message=r".*infer the batch indices.*")
    # figures of the bound are equal on all processes when they are logged
    warnings.filterwarnings("ignore", message=r".*sync_dist=True.*")


def main(args: list[str] | None = None) -> None:
    """Entry point of ``ddpm``: exit status 2 and one sentence for bad input."""
    _quieten()
    try:
        DiffusionCLI(args)
    except InputError as error:
        print(f"ddpm: error: {error}", file=sys.stderr)
        sys.exit(2)
