"""The command line: ``ddpm fit | validate | test | predict | sample``."""

import re
import signal
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from ddpm_lightning.callbacks.choice import choose_callbacks
from ddpm_lightning.checkpoints.files import LAST
from ddpm_lightning.command_line import own_error
from ddpm_lightning.commands import COMMANDS, run_command
from ddpm_lightning.configuration import PARSER_MODE, configuration_files, with_shipped

# named here, so that a configuration can write MNIST for ddpm_lightning.data.MNIST, and so on
from ddpm_lightning.data.datamodule import ArrayDataModule
from ddpm_lightning.data.own import instantiate_data
from ddpm_lightning.errors import InputError, RunError
from ddpm_lightning.failures import end
from ddpm_lightning.first_screen import COMMANDS as ALL_COMMANDS
from ddpm_lightning.first_screen import answered
from ddpm_lightning.jobs.dry_run import DryRun
from ddpm_lightning.jobs.submit import submit
from ddpm_lightning.jobs.torchrun import meet_again, processes
from ddpm_lightning.links import fact_of, follow_data, keep_scale
from ddpm_lightning.loggers import in_run
from ddpm_lightning.numbers import check_numbers, leaves
from ddpm_lightning.own_code import failure_in_own_code, find_own_modules
from ddpm_lightning.parse_errors import sentence
from ddpm_lightning.runs import Run
from ddpm_lightning.runs.disk import disk_errors_in
from ddpm_lightning.sweeps import run_sweep
from ddpm_lightning.sweeps.definition import FILE as SWEEP
from ddpm_lightning.trainer import DiffusionTrainer
from ddpm_lightning.training import DiffusionModule, GenerativeModule
from ddpm_lightning.training.hardware import resolve
from ddpm_lightning.words import folder_of, of_a_run, quieten, refuse_late_command, with_pretrained

__all__ = ["BuiltOnly", "DiffusionCLI", "ParsedOnly", "main"]


class _SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration in the run's folder: config.yaml of fit, config-STAGE.yaml of the others."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet in ``fit``: what is asked for may be refused until the first step."""
        if stage != "fit":
            # the Trainer hands over a member of an enumeration, whatever the signature says
            self._write(trainer, f"config-{TrainerFn(stage).value}.yaml")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.already_saved:
            self._write(trainer, "config.yaml")
            self.already_saved = True

    def _write(self, trainer: Trainer, name: str) -> None:
        if trainer.is_global_zero:
            # a path in a configuration that is copied with its run would lead back to the original
            config = Namespace({**vars(self.config), "ckpt_path": None})
            Run.of(trainer).write(name, self.parser.dump(config, skip_none=False, skip_validation=True))


@contextmanager
def _own_code() -> Iterator[None]:
    """Say where a module of the user's failed; what the package itself says of its arguments stays."""
    try:
        yield
    except Exception as error:
        if own_error(error) is None and (failure := failure_in_own_code(error)):
            raise InputError(failure) from error
        raise


class _Parser(LightningArgumentParser):
    """A parser that says in one sentence what it cannot read, and where a module of the user's failed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if failure := failure_in_own_code(ex):
            raise InputError(failure) from ex
        if ex is not None and (own := own_error(ex)):
            raise own
        if not self.exit_on_error:  # the parser of a part: the one around it names the option
            super().error(message, ex)
        named = re.search(r"required: (\w+)\.", message)
        command = named[1] if named else ""
        raise InputError(sentence(message, self._option_string_actions, command)) from ex


class DiffusionCLI(LightningCLI):
    """LightningCLI with a run folder, links from the data to the model, ``sample``, and errors of one sentence.

    Args:
        args: the words of the command line; None for the program's own.
        callbacks: more callbacks, which are no part of the configuration.
    """

    def __init__(self, args: list[str] | None = None, callbacks: Sequence[Callback] = ()) -> None:
        self._more_callbacks = callbacks
        self._dry_run: DryRun | None = None
        words = sys.argv[1:] if args is None else args
        self._module = _module_of(words)
        self._command = words[0] if words[:1] and words[0] in self.subcommands() else None
        # abbreviations would turn a misspelt option into another one
        parser_kwargs: dict[str, Any] = {"parser_mode": PARSER_MODE, "allow_abbrev": False, "prog": "ddpm"}
        super().__init__(
            self._module,
            LightningDataModule,
            trainer_class=DiffusionTrainer,
            parser_class=_Parser,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=_SaveConfig,
            seed_everything_default=0,
            parser_kwargs={
                **parser_kwargs,
                "description": "Train, evaluate and sample diffusion models. RUN is the folder of a run, or "
                "--pretrained NAME. There are also: ddpm evaluate quality|ood|flow|forms|variance RUN, and "
                "ddpm density|reweight|average|export RUN, and ddpm sweep|submit|new.",
                # argparse's own usage is a page of 80 options before the one line of the error
                **{name: {**parser_kwargs, "usage": f"ddpm {name} [RUN] [options]"} for name in self.subcommands()},
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

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Options for the command that is asked for alone: to collect those of all five takes longer than to parse."""
        if self._command not in (None, subcommand):
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            switch: dict[str, Any] = {"action": "store_true", "default": SUPPRESS}  # not in a configuration
            parser.add_argument("--dry_run", help="Check what a job needs, in two steps; keep nothing.", **switch)
            parser.add_argument("--no_device_check", help="--dry_run for another machine's devices.", **switch)
        return parser

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "verbose": False} if subcommand in ("validate", "test") else kwargs

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Folder for all that the run writes.")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        name = f"{self._module.__module__}.{self._module.__qualname__}"
        parser.add_argument("--module", type=str, default=name, help="LightningModule, by its import path.")
        for fact in ("shape", "levels", "num_classes"):
            parser.link_arguments(f"data.{fact}", f"model.{fact}", apply_on="instantiate")
        more = ("scale", "vector_size", "field_channels")
        for fact in [each for each in more if each in signature(self._module).parameters]:
            parser.link_arguments(
                "data", f"model.{fact}", compute_fn=partial(fact_of, fact=fact), apply_on="instantiate"
            )
        parser.link_arguments("data.levels", "model.decoder.init_args.levels", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Leave the command line alone: what it says beats what a checkpoint remembers."""

    def before_instantiate_classes(self) -> None:
        """Look at the run folder and the checkpoint before anything is built or loaded."""
        config = self.config[self.subcommand]
        if (config.model.decoder.get("init_args") or {}).get("levels") is not None:
            raise InputError("--model.decoder.init_args.levels follows the data: leave it out")
        run = Run(config.run_dir)
        if self.subcommand == "fit" and (run.folder / SWEEP).is_file():
            raise InputError(f"--run_dir {run.folder} is the folder of a sweep: give another one to a run")
        if config.get("dry_run"):
            self._dry_run = DryRun(run, config.trainer, bool(config.get("no_device_check")))
        elif config.get("no_device_check"):
            raise InputError("--no_device_check says what --dry_run is to leave out: give both, or neither")
        elif not config.trainer.fast_dev_run:
            run.make()
        config.run_dir = config.trainer.default_root_dir = str(run.folder)
        self._resolve_hardware(config.trainer, run)
        asked = config.get("ckpt_path")
        if self.subcommand != "fit" or asked not in (None, "last"):
            config["ckpt_path"] = asked if asked in (None, "hpc") else str(run.checkpoint(asked))
            return
        newest = run.newest_checkpoint()
        if asked is None and newest and not config.trainer.fast_dev_run:
            raise InputError(
                f"{run.folder} already holds a run ({newest}). Go on with it: --ckpt_path last. "
                "Start another: --run_dir FOLDER"
            )
        if asked == "last":
            # a job that is queued again goes on with itself, and is started with the same command
            if newest is None:
                _say(f"no checkpoint in {run.checkpoints} yet: training starts from scratch")
            elif newest.name != LAST:
                _say(f"there is no {LAST} in {run.checkpoints}: training goes on from {newest.name}")
            config["ckpt_path"] = newest and str(newest)

    def _resolve_hardware(self, trainer: Namespace, run: Run) -> None:
        """Put what ``auto`` stands for here into the configuration that is saved; a run keeps the precision it has."""
        if trainer.precision == "auto" and run.config_path.is_file() and run.newest_checkpoint():
            trainer.precision = run.config.get("trainer", {}).get("precision", "auto")
        options = (trainer.accelerator, trainer.precision, trainer.devices, trainer.num_nodes)
        trainer.accelerator, trainer.precision, said = resolve(*options)
        for line in said:
            _say(line)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with _own_code():
            super().parse_arguments(parser, args)
        # before Lightning takes the seed
        check_numbers(self.config[self.config.subcommand].as_dict())

    def _dump_config(self) -> None:
        """As Lightning's, which checks all values again: most of the time of writing them."""
        if not hasattr(self, "config_dump"):
            as_text = {"skip_link_targets": False, "skip_unset": False, "skip_validation": True, "format": "yaml"}
            self.config_dump = yaml.safe_load(self.parser.dump(self.config, **as_text))[self.config.subcommand]

    def instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        described = config.data
        try:
            with _own_code():
                data = instantiate_data(described)
                follow_data(config.model, data)
                keep_scale(described, data)
                self._dump_config()  # what the module keeps as its arguments: the data described
                config.data = data
                with in_run(config.trainer, Run(config.run_dir).folder):
                    super().instantiate_classes()
        except ValueError as error:
            raise InputError(self._with_option(str(own_error(error) or error))) from error
        finally:
            config.data = described

    def _with_option(self, message: str) -> str:
        """The option in the place of the argument that a message begins with, where only one has this value."""
        name, _, rest = message.partition(" = ")
        found = [
            key
            for key, value in leaves(self.config[self.subcommand].as_dict())
            if key.endswith(f".{name}") and isinstance(value, int | float)
            if rest.partition(" ")[0] in (str(value), f"{value:g}")
        ]
        return f"--{found[0]} = {rest}" if len(found) == 1 else message

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with TensorBoard in the run folder, and progress that fits where it is shown."""
        config = self.config_init[self.subcommand].trainer
        callbacks, follow = choose_callbacks(str(self.subcommand), vars(config), config.callbacks, sys.stdout.isatty())
        kwargs |= follow
        if config.logger in (None, True) and not config.barebones:
            writes = self.subcommand in ("fit", "validate", "test")
            tensorboard = partial(TensorBoardLogger, name="", version="", default_hp_metric=False)
            kwargs["logger"] = tensorboard(config.default_root_dir) if writes else False
        kwargs |= processes(config.devices)
        meet_again()
        if self._dry_run:
            kwargs |= self._dry_run.trainer_options(config.callbacks)
            callbacks = kwargs.pop("callbacks")
        return super().instantiate_trainer(**kwargs, callbacks=[*callbacks, *self._more_callbacks])

    def _run_subcommand(self, subcommand: str) -> None:
        alone = subcommand == "fit" and self.trainer.is_global_zero
        with Run.of(self.trainer).lock() if alone else nullcontext():
            try:
                with disk_errors_in(Run.of(self.trainer).folder):
                    super()._run_subcommand(subcommand)
            except (InputError, RunError):
                # the other processes of this run may be waiting for this one, and note signals between steps only
                if self.trainer.strategy.launcher is not None:
                    self.trainer.strategy.launcher.kill(signal.SIGKILL)
                raise

    def before_fit(self) -> None:
        if self.trainer.is_global_zero and self._dry_run is None:
            fast = self.config_init["fit"].trainer.fast_dev_run
            where = "fast_dev_run keeps nothing" if fast else f"run folder {self.trainer.default_root_dir}"
            print(f"{self._in_words()}; {where}", flush=True)

    def after_fit(self) -> None:
        if self._dry_run:
            self._dry_run.report(self._in_words())

    def _in_words(self) -> str:
        """The model and the data."""
        model = self.model.model
        network = model.network if isinstance(self.model, DiffusionModule) else model
        parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
        data = self.datamodule
        images = f" ({data.sizes['train']:,} training images)" if isinstance(data, ArrayDataModule) else ""
        return f"{type(network).__name__} with {parameters:,} parameters on {type(data).__name__}{images}"


class ParsedOnly(DiffusionCLI):
    """Reads a command line, and does nothing."""

    @property
    def read(self) -> Namespace:
        """What it says."""
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class BuiltOnly(DiffusionCLI):
    """Parses and instantiates, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _module_of(args: list[str]) -> type[GenerativeModule]:
    """The module that the last configuration file or option names, which decides what options ``--model`` has."""
    name = ""
    for loaded in configuration_files(args):
        name = loaded.get("module", name)
    for option, value in pairwise([word for each in args for word in each.split("=", 1)]):
        name = value if option == "--module" else name
    if not name:
        return DiffusionModule
    try:
        found = resolve_name(str(name))
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"--module {name} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, GenerativeModule)):
        raise InputError(f"--module {name} is no GenerativeModule: there are DiffusionModule and HierarchyModule")
    return found


def main(args: list[str] | None = None) -> None:
    """The command line: one sentence and status 2 for bad input, 1 for all else that stops it (``failures.py``)."""
    words = sys.argv[1:] if args is None else args
    if answered(words):
        return
    quieten()
    find_own_modules()
    words = with_shipped(["--help" if word == "--help_all" else word for word in words])
    try:
        refuse_late_command(words, ALL_COMMANDS)
        words, of_runs = with_pretrained(words), DiffusionCLI.subcommands()
        if words[:1] == ["sweep"]:
            run_sweep(words[1:], DiffusionCLI, BuiltOnly)
        elif words[:1] == ["submit"]:
            submit(
                words[1:],
                ALL_COMMANDS,
                lambda line: ParsedOnly(of_a_run(with_shipped(line), DiffusionCLI.subcommands())).read,
            )
        elif words[:1] in (["evaluate"], *([name] for name in COMMANDS)):
            run_command(words[0], words[1:])
        else:
            DiffusionCLI(of_a_run(words, of_runs))
    except Exception as error:
        sys.exit(end(error, "ddpm", folder_of(words)))
    except KeyboardInterrupt as error:
        sys.exit(end(error, "ddpm"))


_say = rank_zero_only(partial(print, flush=True))
