"""Where on the axis of steps an evaluation is logged."""

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

__all__ = ["LogAtCheckpoint"]


class LogAtCheckpoint(Callback):
    """Logs what ``validate`` and ``test`` measure at the step and the epoch of the checkpoint.

    Lightning takes both from the loops of training, which an evaluation does not restore: it would log at step 0. They
    are put back, since the same Trainer may go on training.
    """

    def __init__(self) -> None:
        self._before = (0, 0)

    def _move(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._before = trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.current_epoch
            module = cast(Any, pl_module)  # a RestorableModule, which imports this module
            self._set(trainer, module.steps_trained, max(trainer.current_epoch, module.epochs_trained))

    def _put_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._set(trainer, *self._before)

    def _set(self, trainer: Trainer, step: int, epoch: int) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = step
        trainer.fit_loop.epoch_progress.current.completed = epoch

    on_validation_start = on_test_start = _move
    on_validation_end = on_test_end = _put_back
