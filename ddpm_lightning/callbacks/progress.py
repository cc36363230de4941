"""Progress where there is no terminal, and the rate of training."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from ddpm_lightning.training.module import GenerativeModule

__all__ = ["EpochLines", "ImagesPerSecond"]


class EpochLines(Callback):
    """One line an epoch, for logs and pipes, where a progress bar would write thousands.

    An evaluation that takes long says every ``interval`` seconds how far it is.
    """

    interval = 20.0

    def __init__(self) -> None:
        self._next = 0.0

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GenerativeModule)
        metrics = trainer.callback_metrics
        parts = [f"epoch {trainer.current_epoch}", f"step {trainer.global_step}"]
        if "train/loss" in metrics:
            parts.append(f"loss {float(metrics['train/loss']):.4f}")
        for form, scores in pl_module.bound_scores.get("val", {}).items():
            bits = scores["elbo"].in_bits(pl_module.dims)
            parts.append(f"val/{form} {bits.mean:.4f} +- {bits.se:.4f} bits/dim")
        if "val/frechet" in metrics:
            parts.append(f"val/frechet {float(metrics['val/frechet']):.4f}")
        if "train/images_per_second" in metrics:
            parts.append(f"{float(metrics['train/images_per_second']):.0f} images/s")
        print(" | ".join(parts), flush=True)

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
