"""Signals that ask a run to stop: SIGTERM, and SIGUSR1, which schedulers send ahead of the end of the time limit."""

import os
import signal
import subprocess
import threading
from types import FrameType

import torch
from lightning.pytorch import Trainer

__all__ = ["StopSignals", "StoppedBySignal"]


class StoppedBySignal(SystemExit):
    """Ends the process with the status that shells give a signal: 128 + its number, 143 for SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopSignals:
    """Notes signals when they come, for the training loop to act on between two steps.

    Lightning would save in the handler itself, between any two lines of a step: with the optimiser stepped and the
    average not. And it leaves with status 0, without saving, on SIGTERM.
    """

    def __init__(self) -> None:
        self._noted = 0

    def install(self) -> None:
        """Take over from the handlers of Lightning, which puts back the ones before its own when training ends."""
        self._noted = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number

    def received(self, trainer: Trainer) -> int:
        """The number of the signal that any process has received, the same on all; 0 for none."""
        noted = self._noted or (signal.SIGTERM if trainer.received_sigterm else 0)
        if trainer.world_size == 1:
            return noted
        shared = torch.tensor(noted, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(shared, reduce_op="max"))

    def leave(self, trainer: Trainer, number: int, saved: str) -> None:
        """Say what was saved, have SLURM queue the job again on SIGUSR1, and end the process.

        Raises:
            StoppedBySignal: always.
        """
        if trainer.is_global_zero:
            name = signal.Signals(number).name
            print(f"{name} at step {trainer.global_step}: {saved} saved, go on with --ckpt_path last", flush=True)
            if number == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
                _requeue()
        raise StoppedBySignal(number)


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        status = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        status = error.errno or 1
    print(f"scontrol requeue {job}: {'done' if status == 0 else f'failed with {status}'}", flush=True)
