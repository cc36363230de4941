"""One trial: an ordinary training in this process, watched."""

import gc
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ddpm_lightning.errors import InputError, RunError
from ddpm_lightning.failures import told

__all__ = ["Fit", "NoSuchValue", "Outcome", "Target", "Watch", "target_of", "train"]

PAUSE = 20.0
"""Seconds between two lines that say how far a trial is."""


class Fitted(Protocol):
    """What a training leaves."""

    trainer: Any
    model: LightningModule
    datamodule: LightningDataModule


Fit = Callable[..., Any]
"""``fit(words, callbacks)``: runs the words of a command line with more callbacks, and returns a :class:`Fitted`."""


@dataclass(frozen=True)
class Target:
    """What trials are compared by, and whether the min or the max of it is best."""

    monitor: str
    mode: str

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """The same in Optuna's words."""
        return "minimize" if self.mode == "min" else "maximize"

    def better(self, a: float, b: float | None) -> bool:
        return b is None or (a < b if self.mode == "min" else a > b)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. The value is the best of its validations; the reason is that of a failure."""

    state: Literal["complete", "pruned", "failed"]
    value: float | None = None
    step: int = 0
    reason: str = ""


class NoSuchValue(InputError):
    """The validation does not measure what the sweep compares: all other trials would fail in the same way."""


def target_of(trainer: Trainer, monitor: str | None, mode: str | None) -> Target:
    """What a training is judged by: what the sweep says, else what its checkpoint callback monitors.

    Raises:
        InputError: neither says it.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            if monitor in (None, callback.monitor):
                return Target(callback.monitor, mode or callback.mode)
            break
    if monitor is None:
        raise InputError(
            "nothing says what trials are compared by: write monitor: val/denoising/bits_per_dim into the sweep's file"
        )
    return Target(monitor, mode or "min")


class Watch(Callback):
    """Reports each validation of a trial to its study, and stops a trial that has no prospects.

    Validations are counted from 1, so that trials with other batch sizes are compared at the same part of training.
    """

    def __init__(self, trial: Any, target: Target, say: Callable[[str], None]) -> None:
        self.trial, self.target, self.say = trial, target, say
        # of validations that were reported before the trial's worker was killed: number -> global step
        self.steps: dict[str, int] = dict(trial.user_attrs.get("steps", {}))
        self.best: float | None = trial.user_attrs.get("best")
        self.pruned = False
        self._line = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        measured = trainer.callback_metrics.get(self.target.monitor)
        if measured is None:
            known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise NoSuchValue(f"monitor: {self.target.monitor} is not measured; there are {', '.join(known) or 'none'}")
        if not math.isfinite(value := float(measured)):
            raise RunError(f"{self.target.monitor} is {value} at step {trainer.global_step}")
        if trainer.global_step in self.steps.values():
            return  # done again, from the checkpoint before
        number = len(self.steps) + 1
        self.steps[str(number)] = trainer.global_step
        if self.target.better(value, self.best):
            self.best = value
        self.trial.report(value, number)
        self.trial.set_user_attr("steps", self.steps)
        self.trial.set_user_attr("best", self.best)
        in_training = trainer.state.fn == "fit" and not _is_last(trainer)
        if in_training and self.trial.should_prune():
            self.pruned = trainer.should_stop = True
        if in_training and time.monotonic() - self._line >= PAUSE:
            self._line = time.monotonic()
            self.say(f"trial {self.trial.number}: step {trainer.global_step}, {self.target.monitor} {value:.4f}")


def _is_last(trainer: Trainer) -> bool:
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (
        last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    )


def train(fit: Fit, words: list[str], folder: Path, watch: Watch) -> Outcome:
    """Train as a command line says, with all that it prints in the trial's log.txt.

    What the training changes in this process is put back, and its memory is given back, for the next one.

    Raises:
        SystemExit, KeyboardInterrupt: the training was asked to stop.
        NoSuchValue: see there.
    """
    begin = time.monotonic()
    seconds = watch.trial.user_attrs.get("seconds", 0.0)
    outcome = Outcome("failed")
    try:
        with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log), _as_it_was():
            outcome = _train(fit, words, folder, watch)
    finally:
        watch.trial.set_user_attr("seconds", seconds + time.monotonic() - begin)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return outcome


def _train(fit: Fit, words: list[str], folder: Path, watch: Watch) -> Outcome:
    done: Fitted | None = None
    step = 0
    try:
        done = fit(words, [watch])
        if watch.best is None:  # training ended between two validations
            done.trainer.validate(done.model, done.datamodule, verbose=False)
        if watch.best is None:
            raise InputError(f"no validation measured {watch.target.monitor}: take --trainer.limit_val_batches away")
        step = done.trainer.global_step
    except NoSuchValue:
        raise
    except Exception as error:
        sentence, _ = told(error, folder)
        print(sentence)
        return Outcome("failed", watch.best, step, sentence)
    finally:
        _finish_wandb()
    return Outcome("pruned" if watch.pruned else "complete", watch.best, step)


def _finish_wandb() -> None:
    """End a run of Weights & Biases, which the next trial would go on with."""
    if (wandb := sys.modules.get("wandb")) is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back what a training changes in its process, for the next one."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    backends = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    settings = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = backends
        torch.set_default_dtype(settings[0])
        torch.set_float32_matmul_precision(settings[1])
        torch.use_deterministic_algorithms(deterministic)
