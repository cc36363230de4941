"""Progress where there is no terminal, and the rate of training."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from ddpm_lightning.metrics import BoundScores
from ddpm_lightning.training.module import GenerativeModule

__all__ = ["EpochLines", "ImagesPerSecond"]


class EpochLines(Callback):
    """Lines for logs and pipes, where a progress bar would write thousands: one for each new bound, else one at the end
    of an epoch, if ``pause`` seconds have passed since the last line, or training ends. A line shows what was measured
    since the line before.

    An evaluation that takes long says every ``interval`` seconds how far it is.
    """

    interval = 20.0
    pause = 5.0

    def __init__(self) -> None:
        self._next = 0.0
        self._last_line = 0.0
        self._known: dict[str, float] = {}
        self._bound: BoundScores | None = None  # that was shown last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GenerativeModule)
        self._last_line = time.monotonic()
        self._bound = pl_module.bound_scores.get("val")  # of a sanity check
        self._known = _values(trainer)  # of the checkpoint

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # at the end of an epoch, what other callbacks measure is waited for
        in_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if in_training and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._say(trainer, pl_module)

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GenerativeModule)
        is_new = pl_module.bound_scores.get("val") is not self._bound
        ends = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        ends |= trainer.global_step == trainer.max_steps
        if is_new or ends or time.monotonic() - self._last_line >= self.pause:
            self._say(trainer, pl_module)

    def _say(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GenerativeModule)
        values = _values(trainer)
        new = {name: value for name, value in values.items() if value != self._known.get(name)}
        bound = pl_module.bound_scores.get("val")
        parts = [f"epoch {trainer.current_epoch}", f"step {trainer.global_step}"]
        if "train/loss" in new:
            parts.append(f"loss {new['train/loss']:.4f}")
        for form, scores in bound.items() if bound is not None and bound is not self._bound else ():
            bits = scores["elbo"].in_bits(pl_module.dims)
            parts.append(f"val/{form} {bits.mean:.4f} +- {bits.se:.4f} bits/dim")
        if "val/frechet" in new:
            parts.append(f"val/frechet {new['val/frechet']:.4f}")
        if "train/images_per_second" in new:
            parts.append(f"{new['train/images_per_second']:.0f} images/s")
        print(" | ".join(parts), flush=True)
        self._last_line, self._known, self._bound = time.monotonic(), values, bound

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._next = time.monotonic() + self.interval

    def _tick(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if time.monotonic() < self._next or not trainer.is_global_zero:
            return
        self._next = time.monotonic() + self.interval
        stage = trainer.state.stage.value if trainer.state.stage else ""
        totals = {"validate": trainer.num_val_batches, "test": trainer.num_test_batches}
        total = totals.get(stage, trainer.num_predict_batches)
        print(f"{stage}: batch {batch_idx + 1} of {sum(total) if isinstance(total, list) else total}", flush=True)

    on_validation_start = on_test_start = on_predict_start = _start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _tick


def _values(trainer: Trainer) -> dict[str, float]:
    names = ("train/loss", "val/frechet", "train/images_per_second")
    return {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}


class ImagesPerSecond(Callback):
    """Training rate over the steps since the last log, validation and pictures left out: train/images_per_second.

    Counts the images of all processes. Unlike Lightning's ThroughputMonitor it does not synchronise the device at
    each step; on a GPU the rate is right once the queue is full.
    """

    def __init__(self) -> None:
        self._images, self._seconds, self._start = 0, 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - self._start
        self._images += len(batch.image) * trainer.world_size
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's connectors set it
        if interval and trainer.global_step % interval == 0:
            pl_module.log("train/images_per_second", self._images / self._seconds, batch_size=1)
            self._images, self._seconds = 0, 0.0
