"""A callback that keeps averages of the weights whose width can be chosen after training."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ddpm_lightning.checkpoints.weights import check_state
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.runs.averages import STATE_KEY, Snapshots
from ddpm_lightning.runs.run import Run
from ddpm_lightning.training.averaged import AveragedModule
from ddpm_lightning.training.ema import WeightAverage
from ddpm_lightning.training.power_average import exponent, power_decay
from ddpm_lightning.training.sharding import ShardedStrategy

__all__ = ["PowerAverages"]


class PowerAverages(Callback):
    """Keeps two averages of the weights and snapshots of them, from which ``ddpm average RUN --sigma_rel X`` makes the
    average of any width (Karras et al. 2023, arXiv 2312.02696, section 3).

    The averaged model that is evaluated in training is not touched. Every checkpoint holds the averages at its step, so
    a run that goes on ends with the bits of one that was left alone. Snapshots are RUN/checkpoints/averages-STEP.pt, of
    the size of ``widths`` networks in float32 each. When there are more than ``keep`` every other one goes, and the
    interval doubles: on disk there are keep / 2 to keep. The fewer they are, the larger the error of a width that was
    not kept, which ``ddpm average`` prints.

    Args:
        every_n_train_steps: optimiser steps between snapshots at first.
        keep: so many snapshots at most, 2 or more.
        widths: relative widths sigma_rel of the averages, 0.01 to 0.28.

    Raises:
        InputError: a number out of its range; sharded weights; a run that began without these averages.
    """

    def __init__(self, every_n_train_steps: int = 100, keep: int = 16, widths: Sequence[float] = (0.05, 0.1)) -> None:
        at_least(1, every_n_train_steps=every_n_train_steps)
        at_least(2, keep=keep)
        self.every_n_train_steps, self.keep = every_n_train_steps, keep
        self.widths = {f"{width:g}": exponent(width) for width in widths}
        if not self.widths:
            raise InputError("widths = [] must name one width or more, for example [0.05, 0.1]")
        self._step = 0
        self._restored: dict[str, dict[str, Tensor]] = {}
        self._models: dict[str, nn.Module] = {}
        self._averages: dict[str, WeightAverage] = {}

    @property
    def state_key(self) -> str:
        return STATE_KEY

    def state_dict(self) -> dict[str, Any]:
        averages = {width: model.state_dict() for width, model in self._models.items()} or self._restored
        return {"step": self._step, "averages": averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = int(state_dict["step"])
        self._restored = {width: dict(average) for width, average in state_dict["averages"].items()}
        self._models = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, ShardedStrategy):
            raise InputError("PowerAverages keeps whole weights, and these are sharded: use --trainer.strategy ddp")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the averages where the weights are now."""
        assert isinstance(pl_module, AveragedModule)
        state, self._restored = self.state_dict(), {}
        if trainer.global_step != self._step or (self._step and state["averages"].keys() != self.widths.keys()):
            raise InputError(
                f"PowerAverages: the checkpoint of step {trainer.global_step} does not hold the averages "
                f"{', '.join(self.widths)}, which are kept from the first step on: leave the callback as it was, or out"
            )
        # float32, whatever the precision of training
        self._models = {width: deepcopy(pl_module.ema_model) for width in self.widths}
        for width, model in self._models.items() if self._step else ():
            check_state("averages", model.state_dict(), state["averages"][width])
            model.load_state_dict(state["averages"][width])
        self._averages = {width: WeightAverage(model, pl_module.model) for width, model in self._models.items()}
        self._prune(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # between accumulated batches
            return
        self._step = trainer.global_step
        for width, average in self._averages.items():
            average.update(power_decay(self._step, self.widths[width]))
        if self._step % self.every_n_train_steps == 0 and trainer.is_global_zero:
            if self._step % self._interval() == 0:
                Snapshots(Run.of(trainer)).write(self._step, self.state_dict()["averages"])
            self._prune(trainer)

    def _interval(self) -> int:
        interval = self.every_n_train_steps
        while self._step // interval > self.keep:
            interval *= 2
        return interval

    def _prune(self, trainer: Trainer) -> None:
        """Delete the snapshots that are too many, and those that another run of these steps has left."""
        if trainer.is_global_zero:
            interval = self._interval()
            Snapshots(Run.of(trainer)).keep(range(interval, self._step + 1, interval))
