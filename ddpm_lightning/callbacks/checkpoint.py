"""The checkpoint to go on from."""

from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ddpm_lightning.runs.signals import StopSignals

__all__ = ["LastCheckpoint"]


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` of the latest state: after each validation, or as often as asked for, and whenever training
    stops, in the middle of an epoch too (``max_time``).

    SIGTERM and SIGUSR1 stop training after the step in progress, with status 143 and 138; on SIGUSR1 a SLURM job is
    queued again. With a validation in progress, after the first step that follows it.

    A state that is due just before a validation is saved just after it: a run that goes on from before would leave the
    validation out.

    Args:
        every_n_train_steps: that often.
        train_time_interval: instead, that often by the clock.
    """

    def __init__(self, every_n_train_steps: int | None = None, train_time_interval: timedelta | None = None) -> None:
        super().__init__(
            filename="last",
            monitor=None,
            save_top_k=1,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            enable_version_counter=False,
        )

        self._stopped_at: int | None = None
        self._validation_follows = False
        self._is_due = False
        self._signals = StopSignals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and listen."""
        super().on_train_start(trainer, pl_module)
        self._signals.install()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where training is about to stop, while the Trainer still knows that the epoch is not over."""
        loop = trainer.fit_loop
        self._validation_follows = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._validation_follows = False
        number = self._signals.received(trainer)
        if trainer.should_stop or trainer.global_step == trainer.max_steps or number:
            self._save_stop(trainer)
        if number:
            self._signals.leave(trainer, number, self.format_checkpoint_name({}))

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._validation_follows:
            self._is_due = True
        else:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was due before the validation."""
        super().on_validation_end(trainer, pl_module)
        is_due, self._is_due = self._is_due, False
        if is_due and self._stopped_at != trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a checkpoint of the middle of an epoch alone."""
        if self._stopped_at != trainer.global_step:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state in which training stopped, unless it is the one saved last."""
        if trainer.global_step not in (self._last_global_step_saved, self._stopped_at):
            self._save_stop(trainer)

    def _save_stop(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning's connectors set it
            return
        if trainer.global_step not in (self._last_global_step_saved, self._stopped_at):
            trainer.save_checkpoint(self.format_checkpoint_name({}))
        self._stopped_at = trainer.global_step
