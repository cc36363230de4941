"""The checkpoint to go on from."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from ddpm_lightning.checkpoints.files import LAST
from ddpm_lightning.errors import InputError
from ddpm_lightning.runs.run import Run
from ddpm_lightning.runs.signals import StopSignals

__all__ = ["LastCheckpoint"]


class LastCheckpoint(Checkpoint):
    """Keeps ``RUN/checkpoints/last.ckpt``, from which the run goes on.

    It is saved after each validation (without validations, after each epoch), where training stops (``max_time``), and
    as often as asked for besides. Other checkpoints are always saved before it, so that it knows them.

    SIGTERM and SIGUSR1 stop training after the step in progress, or after the validation in progress, with status 143
    and 138; on SIGUSR1 a SLURM job is queued again.

    Args:
        every_n_train_steps: save that often, too.
        train_time_interval: save that often by the clock, too.

    Raises:
        InputError: both are given, or ``every_n_train_steps`` is less than 1.
    """

    def __init__(self, every_n_train_steps: int | None = None, train_time_interval: timedelta | None = None) -> None:
        if every_n_train_steps is not None and train_time_interval is not None:
            raise InputError("LastCheckpoint: give every_n_train_steps or train_time_interval, not both")
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise InputError(f"LastCheckpoint: every_n_train_steps = {every_n_train_steps} must be 1 or more")
        self.every_n_train_steps, self.train_time_interval = every_n_train_steps, train_time_interval
        self._signals = StopSignals()
        self._is_due = False
        self._saved_at = (0, 0.0)  # step and time

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Become the last callback of all."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # Lightning's connectors set it

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let other checkpoint callbacks find their files, and know their scores, in a folder that was moved."""
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state and callback.dirpath and state["dirpath"]:
                _move(state, Path(state["dirpath"]), Path(callback.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_due = False
        self._saved_at = trainer.global_step, time.monotonic()
        self._signals.install()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._is_due:  # the loss of the batch before is logged now
            self._save_what_is_due(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._is_due |= self._is_time(trainer)
        validates = loop._should_check_val_fx(fit._data_fetcher)  # type: ignore[arg-type]
        if _ends(trainer) or (loop.batch_progress.is_last_batch and not validates):
            return
        if self._signals.received(trainer):  # do not wait for a validation, which would take long
            # Lightning logs the loss after this hook
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()
            self._save_what_is_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._is_due = True
            # after the last validation of an epoch the other callbacks come first
            if not _ends(trainer) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                self._save_what_is_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        often = self.every_n_train_steps or self.train_time_interval
        self._is_due |= not (trainer.enable_validation or often)
        if not _ends(trainer):
            self._save_what_is_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_due |= trainer.global_step != self._saved_at[0]
        self._save_what_is_due(trainer)

    def _is_time(self, trainer: Trainer) -> bool:
        if self.every_n_train_steps is not None:
            return not trainer.fit_loop._should_accumulate() and trainer.global_step % self.every_n_train_steps == 0
        if self.train_time_interval is None:
            return False
        seconds = time.monotonic() - self._saved_at[1]
        return bool(trainer.strategy.broadcast(seconds >= self.train_time_interval.total_seconds()))

    def _save_what_is_due(self, trainer: Trainer) -> None:
        number = self._signals.received(trainer)
        path = Run.of(trainer).checkpoints / LAST
        moved_on = number and trainer.global_step != self._saved_at[0]
        if (self._is_due or moved_on) and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by connectors
            for logger in trainer.loggers:
                logger.save()  # what was logged before the checkpoint is not logged again after it
            trainer.save_checkpoint(path)
            self._is_due = False
            self._saved_at = trainer.global_step, time.monotonic()
        if number:
            self._signals.leave(trainer, number, str(path))


def _ends(trainer: Trainer) -> bool:
    """Whether training stops after this batch, or this validation, though the epoch may not be over."""
    stops = trainer.should_stop and trainer.fit_loop._can_stop_early
    return stops or trainer.global_step == trainer.max_steps


def _move(state: dict[str, Any], old: Path, new: Path) -> None:
    """Let the state of a ModelCheckpoint name files in folder ``new`` instead of ``old``, if its best one is there."""

    def moved(path: str) -> str:
        return str(new / Path(path).relative_to(old)) if path and Path(path).is_relative_to(old) else path

    if old != new and Path(moved(state["best_model_path"])).is_file():
        state["dirpath"] = str(new)
        state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = moved(state[name])
