"""Where a checkpoint says that the run goes on."""

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["begin_next_epoch", "rewind_to_step"]


def rewind_to_step(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Count only the batches that the weights have seen, in a checkpoint taken between two accumulated batches.

    The gradients of the batches since the last optimiser step are in no checkpoint. Their order and noise are functions
    of the number of batches done, so that counting them as not done is all it takes to do them again.
    """
    if not trainer.fit_loop._should_accumulate():
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    unused = progress["current"]["ready"] % trainer.accumulate_grad_batches
    for counts in (progress["total"], progress["current"]):
        for name in counts:
            counts[name] -= unused


def begin_next_epoch(trainer: Trainer) -> None:
    """Count the epoch that a run begins with where its checkpoint is of the last batch of the one before.

    Lightning takes the two for one epoch, and a run that is resumed so twice then forgets one. To be called when
    training starts.
    """
    loop = trainer.fit_loop
    batches = loop.epoch_loop
    if batches.restarted_on_train_batch_end and batches.batch_progress.is_last_batch:
        loop.reset_restart_stage()
