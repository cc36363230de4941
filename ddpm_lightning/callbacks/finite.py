"""Training stops where the loss is NaN or infinite."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ddpm_lightning.checkpoints.files import last_good
from ddpm_lightning.errors import RunError
from ddpm_lightning.objectives import TimeDraw, TimeSampler
from ddpm_lightning.runs.run import Run

__all__ = ["StopOnNonFinite"]


class StopOnNonFinite(Callback):
    """Stops training with a :class:`~ddpm_lightning.errors.RunError` where a loss is NaN or infinite.

    The losses are looked at every ``log_every_n_steps`` batches and before each checkpoint, all at once: looking at
    each would make the CPU wait for the GPU at every step. Before a checkpoint the weights are looked at, too: no
    checkpoint with NaN replaces a good one.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor, Tensor | None]] = []
        self._position: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses.clear()
        self._hooks = [
            part.register_forward_hook(self._drawn) for part in pl_module.modules() if isinstance(part, TimeSampler)
        ]

    def _drawn(self, times: TimeSampler, arguments: Any, draw: TimeDraw) -> None:
        self._position = draw.position

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append((trainer.global_step, outputs["loss"].detach(), self._position))
        if len(self._losses) >= (trainer.log_every_n_steps or 50):  # type: ignore[attr-defined]  # set by connectors
            self._check(trainer, None)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer, checkpoint["state_dict"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, None)
        for hook in self._hooks:
            hook.remove()

    def _check(self, trainer: Trainer, state: dict[str, Tensor] | None) -> None:
        kept, self._losses = self._losses, []
        finite = torch.stack([loss for _, loss, _ in kept]).isfinite().tolist() if kept else []
        weights = ((name, value) for name, value in (state or {}).items() if value.is_floating_point())
        bad = [name for name, value in weights if not bool(value.isfinite().all())]
        if not trainer.strategy.reduce_boolean_decision(bool(bad) or not all(finite), all=False):
            return
        where = "is not finite on another process"
        if bad:
            where = f"left {bad[0]} not finite by step {trainer.global_step}"
        if not all(finite):
            step, loss, position = kept[finite.index(False)]
            where = f"is {float(loss)} at step {step}"
            if position is not None:
                where += f", for times from {float(position.min()):.4f} to {float(position.max()):.4f} of 1"
        good = last_good(Run.of(trainer).checkpoints)
        raise RunError(
            f"the loss {where}; the last good checkpoint is {good or 'none'}: try a smaller learning rate, "
            "or --trainer.gradient_clip_val 1"
        )
