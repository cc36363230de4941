"""The checkpoint to go on from."""

from datetime import timedelta

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["LastCheckpoint"]


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` of the latest state: after each validation, on request more often, and whenever training
    stops, in the middle of an epoch too (``max_time``).

    Args:
        every_n_train_steps: also that often.
        train_time_interval: instead, also that often by the clock.
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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state in which training stopped, unless it is the one saved last."""
        if self._last_global_step_saved != trainer.global_step:
            trainer.save_checkpoint(self.format_checkpoint_name({}))
