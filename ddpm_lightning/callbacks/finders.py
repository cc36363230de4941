"""What can be found out before training: a learning rate, a batch size. Each says what it finds and ends the run."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from ddpm_lightning.data.datamodule import ArrayDataModule
from ddpm_lightning.errors import InputError, at_least, positive

__all__ = ["BatchSizeTest", "LearningRateTest"]


class LearningRateTest(LearningRateFinder):
    """Lightning's test of learning rates. Lightning would set an attribute of the module; here the rate is an argument
    of the optimiser, to be given as ``--model.optimizer.init_args.lr``.

    Args:
        min_lr: the rate to start from.
        max_lr: the rate to end with, unless the loss rises to four times its least value before.
        num_training_steps: steps between them.
    """

    def __init__(self, min_lr: float = 1e-6, max_lr: float = 1.0, num_training_steps: int = 100) -> None:
        positive(min_lr=min_lr, max_lr=max_lr)
        at_least(1, num_training_steps=num_training_steps)
        super().__init__(min_lr, max_lr, num_training_steps, update_attr=False)

    def lr_find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().lr_find(trainer, pl_module)
        assert self.optimal_lr is not None
        rate, losses = self.optimal_lr.suggestion(), self.optimal_lr.results["loss"]
        found = "nowhere" if rate is None else f"at --model.optimizer.init_args.lr {rate:.2g}"
        _end(trainer, f"{len(losses)} steps, the loss falls fastest {found}")


class BatchSizeTest(BatchSizeFinder):
    """Lightning's search for the largest batch that fits into memory, by doubling; on one process.

    Args:
        init_val: the batch to start from.
        max_trials: number of batches tried, up to the size of the training split.
        steps_per_trial: steps with each.
    """

    def __init__(self, init_val: int = 64, max_trials: int = 12, steps_per_trial: int = 3) -> None:
        at_least(1, init_val=init_val, max_trials=max_trials, steps_per_trial=steps_per_trial)
        super().__init__("power", steps_per_trial, init_val, max_trials, max_val=2**40)

    def scale_batch_size(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning's connectors set it
        if not isinstance(data, ArrayDataModule):
            raise InputError("BatchSizeTest needs an ImageDataModule or Fields, whose batch_size it changes")
        # Lightning would go on to batches that the split cannot fill
        self._max_trials = min(self._max_trials, (data.sizes["train"] // self._init_val).bit_length())
        super().scale_batch_size(trainer, pl_module)
        _end(trainer, f"the largest batch tried that fits: --data.batch_size {self.optimal_batch_size}")


def _end(trainer: Trainer, line: str) -> None:
    if trainer.is_global_zero:
        print(line, flush=True)
    raise SystemExit(0)
