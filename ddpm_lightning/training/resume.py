"""A run that goes on from a checkpoint ends with the bits of a run that was left alone."""

from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.loops.evaluation_loop import RestartStage as ValidationStage
from lightning.pytorch.loops.training_epoch_loop import RestartStage
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.training.sharding import ShardedStrategy

__all__ = ["ExactResume"]

T = TypeVar("T")


class ExactResume(Callback):
    """Counts batches, epochs and validations so that each is done once, whenever the checkpoint was taken.

    Order and noise are functions of the number of batches done. What else a run needs is counted here:

    - Gradients are in no checkpoint. One that is taken between accumulated batches counts only the batches that the
      weights have seen, and holds the buffers (statistics of BatchNorm, the history of ``ImportanceTimes``) as they
      were then. The other batches are done again; a validation among them is not.
    - A checkpoint that is taken just before a validation says that the validation is still to be done.
    - Lightning guesses from its counts at which point of its loops a checkpoint was taken, and guesses wrong at some.
      The counts are therefore saved as they are between two batches, or between two epochs.

    It also says why nothing is left to train, and lets no learning-rate schedule end before training does.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}  # as the last optimiser step left them
        self._validated = list[int]()  # numbers of batches done at the validations since
        self._validation_due = False
        self._metrics: dict[str, Tensor] = {}  # of the last validation, which other callbacks may look at
        self._trained = False
        self._schedule_end: int | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["loops"]["fit_loop"]
        batches = saved["epoch_loop.batch_progress"]
        counts = batches["current"]
        batches["is_last_batch"] &= counts["ready"] == counts["processed"]  # the next batch may be in progress
        unused = 0 if batches["is_last_batch"] else counts["processed"] % trainer.accumulate_grad_batches
        ends_batch = counts["completed"] < counts["processed"]
        due = ends_batch and not unused and _validation_follows(trainer)
        _settle(saved, due)
        saved["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step
        checkpoint["epoch"] = saved["epoch_progress"]["current"]["completed"]
        if unused:
            for part in ("total", "current"):
                _add(batches[part], -unused)
                _add(saved["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["zero_grad"][part], -1)
            known = checkpoint["state_dict"]
            known.update({name: value for name, value in self._buffers.items() if name in known})
        checkpoint["resume"] = {
            "validation_due": due,
            "validated": self._validated if unused else [],
            "metrics": self._metrics,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up what was noted; a checkpoint of an older version lacks it."""
        if trainer.state.fn != "fit":
            return
        noted = checkpoint.get("resume", {})
        self._validation_due = noted.get("validation_due", False)
        self._validated = list(noted.get("validated", []))
        self._metrics = noted.get("metrics", {})
        if not noted and "fit_loop" in checkpoint.get("loops", {}):
            _settle(checkpoint["loops"]["fit_loop"], False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put Lightning's loops where the run goes on.

        Raises:
            InputError: the learning-rate schedule ends before training does.
        """
        self._trained = True
        fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        changing = _callbacks_of(trainer, GradientAccumulationScheduler)
        for callback in changing:  # Lightning asks it at the beginning of epochs only
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)
        within_epoch = loop.restarting and loop.batch_progress.current.ready > 0
        if not within_epoch:
            fit._restarting = loop.restarting = False
        elif self._validation_due:
            loop.val_loop.restarting = False  # from its first batch
            loop.val_loop._restart_stage = ValidationStage.RESTARTED_MID_EVALUATION
        else:
            loop._restart_stage = RestartStage.NONE
        # the axis of the loggers. Lightning adds 1 before the first batch, or after the validation that is due
        loop._batches_that_stepped = trainer.global_step - int(within_epoch and not loop._should_accumulate())
        self._validation_due = False
        trainer._logger_connector._callback_metrics.update(self._metrics)
        self._end_with_schedule(trainer, bool(changing))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the buffers, where this batch is the first of several that one optimiser step accumulates."""
        batches = trainer.accumulate_grad_batches
        first = batch_idx % batches == 0 or not self._buffers
        sharded = isinstance(trainer.strategy, ShardedStrategy)
        if not first or not (sharded or batches > 1):
            return
        if sharded:
            _share(pl_module, ("model.", "objective.", "ema_model."))
        if batches > 1:
            named = _buffers(pl_module, ("model.", "objective."))
            self._buffers = {name: buffer.clone() for name, buffer in named.items()}
            done = trainer.fit_loop.total_batch_idx
            self._validated = [number for number in self._validated if number > done]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all processes evaluate with the buffers that a checkpoint would hold."""
        if trainer.state.fn == "fit" and trainer.world_size > 1:
            _share(pl_module, ("ema_model.",))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave out a validation that was done before the checkpoint."""
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.total.ready in self._validated:
            loop._skip_next_val = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was measured, and that it was, where this is between accumulated batches."""
        loop = trainer.fit_loop.epoch_loop
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        measured = loop.val_loop._results.metrics(on_step=False)["callback"]
        self._metrics = {name: value.detach().cpu() for name, value in measured.items()}
        if loop._should_accumulate():
            self._validated.append(loop.batch_progress.total.ready)

    def _end_with_schedule(self, trainer: Trainer, changes: bool) -> None:
        """Have no step after the last one of a learning-rate schedule, which torch would end with a traceback; and say
        it where training ends long before the schedule, whose last part is what anneals the weights."""
        ends = [getattr(config.scheduler, "total_steps", None) for config in trainer.lr_scheduler_configs]
        self._schedule_end = end = min((end for end in ends if end is not None), default=None)
        if end is None:
            return
        steps = trainer.max_steps if changes and trainer.max_steps != -1 else trainer.estimated_stepping_batches
        if steps == float("inf") or (changes and trainer.max_steps == -1):
            trainer.fit_loop.epoch_loop.max_steps = end
        elif steps > end:
            raise InputError(
                f"--model.lr_scheduler.total_steps {end} is less than the {steps} steps of training: "
                f"make it {steps}, or set --trainer.max_steps {end}"
            )
        else:
            self._schedule_end = None
            if steps < end - 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                taken = "1 step" if steps == 1 else f"{steps:,.0f} steps"
                _say(
                    trainer,
                    f"the learning rate does not come to its end: training has {taken}, and "
                    f"--model.lr_scheduler.total_steps is {end:,}: make them equal to anneal the weights",
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._schedule_end:
            _say(trainer, f"training ends at step {trainer.global_step}, with --model.lr_scheduler.total_steps")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why nothing was trained.

        Raises:
            InputError: because ``max_time`` is used up.
        """
        if self._trained:
            return
        step, steps, epochs = trainer.global_step, trainer.max_steps, trainer.max_epochs
        if steps != -1 and step >= steps:
            _say(trainer, f"nothing left to train: step {step} of {steps}")
        elif epochs not in (-1, None) and trainer.current_epoch >= epochs:
            _say(trainer, f"nothing left to train: epoch {trainer.current_epoch} of {epochs}, step {step}")
        for timer in _callbacks_of(trainer, Timer):
            if trainer.should_stop and timer._duration is not None:
                raise InputError(
                    f"--trainer.max_time {timedelta(seconds=timer._duration)} is used up "
                    f"({timedelta(seconds=round(timer.time_elapsed()))} trained): give a longer one"
                )


def _callbacks_of(trainer: Trainer, kind: type[T]) -> list[T]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def _buffers(module: LightningModule, parts: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if name.startswith(parts)}


def _share(module: LightningModule, parts: tuple[str, ...]) -> None:
    """Give all processes the first one's buffers, which are those of a checkpoint; DDP does so before each step."""
    for buffer in _buffers(module, parts).values():
        value = buffer.detach().contiguous()
        dist.broadcast(value, 0)
        buffer.copy_(value)


def _validation_follows(trainer: Trainer) -> bool:
    """Whether a validation is to be done after the batch in progress, even if training did not stop."""
    fetcher, stops = trainer.fit_loop._data_fetcher, trainer.should_stop
    if fetcher is None:
        return False
    trainer.should_stop = False
    follows = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    trainer.should_stop = stops
    return follows


def _settle(saved: dict[str, Any], validation_due: bool) -> None:
    """Let the counts of a fit loop be those between two batches; after an epoch's last one, between two epochs."""
    batches, epochs = saved["epoch_loop.batch_progress"], saved["epoch_progress"]
    if batches["current"]["processed"] == 0:  # they are
        return
    epoch_over = batches["is_last_batch"] and not validation_due
    batches["is_last_batch"] &= not epoch_over
    for part in ("total", "current"):
        _set(batches[part], 0 if part == "current" and epoch_over else batches[part]["processed"])
        started = epochs[part]["started"]
        _set(epochs[part], started)
        if not epoch_over:
            # a run that stops within an epoch has counted it as done
            epochs[part] |= {"processed": started - 1, "completed": started - 1}


def _set(counts: dict[str, int], value: int) -> None:
    counts.update(dict.fromkeys(counts, value))


def _add(counts: dict[str, int], value: int) -> None:
    counts.update({name: count + value for name, count in counts.items()})


def _say(trainer: Trainer, line: str) -> None:
    if trainer.is_global_zero:
        print(line, flush=True)
