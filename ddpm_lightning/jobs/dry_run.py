"""``ddpm fit --dry_run``: what a job needs, found out before it is queued."""

import atexit
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ddpm_lightning.data.datamodule import ArrayDataModule
from ddpm_lightning.errors import InputError, RunError
from ddpm_lightning.runs import Run

__all__ = ["DryRun"]

_SLOW = 20.0  # seconds: one step of that length is enough


class DryRun(Callback):
    """Two optimiser steps of a run, in one process and a folder that goes, and a table of what was found.

    Everything is built as the run would build it, a checkpoint that it goes on from is loaded, and a batch is what one
    process of the run would get. Nothing is validated, logged or saved.

    Args:
        run: the run.
        trainer: the options of its Trainer. Those that say where it runs are changed, in place, to one process here.
        elsewhere: plan for another machine: do not ask for its devices here.

    Raises:
        InputError: devices that are not here, a run folder that cannot be written to.
    """

    def __init__(self, run: Run, trainer: Any, elsewhere: bool) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("--dry_run is one process: start it without torchrun, and say how many --trainer.devices")
        self.folder = _existing(run.folder)
        self.asked = run.folder
        self._nodes, self._max_time, self._strategy = trainer.num_nodes, trainer.max_time, trainer.strategy
        self._kind, numbers = _devices(trainer.accelerator, trainer.devices)
        self._processes = len(numbers) * self._nodes
        here = torch.cuda.device_count()
        if self._kind == "GPU" and max(numbers) >= here and not elsewhere:
            raise InputError(
                f"--trainer.devices {trainer.devices}, --trainer.accelerator {trainer.accelerator}: this machine has "
                f"{here or 'no'} GPUs; --no_device_check plans for another machine"
            )
        self._measured_on = "GPU" if self._kind == "GPU" and here else "CPU"
        trainer.accelerator = "gpu" if self._measured_on == "GPU" else "cpu"
        trainer.devices = [min(numbers[0], here - 1)] if self._measured_on == "GPU" else 1
        trainer.num_nodes, trainer.strategy = 1, "auto"
        if trainer.max_epochs is None and trainer.max_steps == -1:
            trainer.max_epochs = -1
        self._found: list[tuple[str, str]] = []
        self._times: list[float] = []
        self._kept, self._checkpoint = 3, 0  # last.ckpt, previous.ckpt, and the one being written

    def trainer_options(self, configured: Sequence[Callback] | Callback | None) -> dict[str, Any]:
        """What the Trainer is to do otherwise than the configuration says."""
        callbacks = configured if isinstance(configured, Sequence) else [configured] if configured else []
        self._kept += sum(max(c.save_top_k, 1) for c in callbacks if isinstance(c, ModelCheckpoint))
        folder = tempfile.mkdtemp(prefix="dry_run.")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        switched_off = ("logger", "enable_checkpointing", "fast_dev_run", "barebones")
        hidden = ("enable_progress_bar", "enable_model_summary")
        return {
            **dict.fromkeys(("min_steps", "min_epochs", "max_time", "profiler")),
            **dict.fromkeys((*switched_off, *hidden), False),
            **dict.fromkeys(("limit_val_batches", "num_sanity_val_steps"), 0),
            "default_root_dir": folder,
            "callbacks": [self],
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]  # Lightning's connectors set it
        if isinstance(data, ArrayDataModule):
            data.planned_processes = self._processes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_steps(trainer)
        self._first, self._start, self._before = trainer.global_step, time.perf_counter(), _peak(pl_module.device)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def _note_steps(self, trainer: Trainer) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]  # see above
        steps: float = trainer.estimated_stepping_batches
        batches = float(trainer.num_training_batches)
        if not isinstance(data, ArrayDataModule) and self._processes > 1:  # Lightning shares out what a DataLoader has
            batches /= self._processes
            steps = steps if steps == trainer.max_steps else steps / self._processes
        done = f"{trainer.global_step:,} done, " if trainer.global_step else ""
        limit = f"until max_time {self._max_time}" if self._max_time else "without end"
        self._steps = limit if steps == float("inf") else f"{done}{steps:,.0f} in all"
        self._steps += f", {batches:,.0f} batches an epoch" if batches != float("inf") else ""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 or not self._found:
            shapes = [f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in _tensors(batch)]
            self._found.append(("batch of a process", shapes[0] if shapes else type(batch).__name__))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after two steps of the optimiser, or a slow one, and note what they took."""
        if trainer.global_step == self._first + len(self._times):
            return  # gradients are accumulated
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        self._times.append(now - self._start)
        self._start = now
        # after each of them: a training may have one step only
        self._memory = _peak(pl_module.device)
        states = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self._checkpoint = sum(x.nbytes for x in _tensors([pl_module.state_dict(), *states]))
        trainer.should_stop = len(self._times) == 2 or self._times[0] > _SLOW

    def report(self, configuration: str) -> None:
        """Print the table.

        Args:
            configuration: the model and the data in a few words.

        Raises:
            RunError: the disk has no room for the checkpoints.
        """
        if not self._times:
            return  # nothing is left to train, as a line has said
        free, needed = shutil.disk_usage(self.folder).free, self._kept * self._checkpoint
        rows = [
            ("configuration", configuration),
            ("run folder", f"{self.asked}, can be written"),
            ("processes", self._in_words()),
            *self._found[:1],
            ("optimiser steps", f"{self._steps}; one took {self._times[-1]:.3g} s here"),
            ("memory", self._memory_in_words()),
            ("checkpoints", f"{_size(self._checkpoint)} each, up to {self._kept} of them; {_size(free)} are free"),
        ]
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
        if needed > free:
            raise RunError(f"{self.folder} has {_size(free)} free, and the checkpoints need {_size(needed)}: make room")
        print("dry run done, nothing kept")

    def _in_words(self) -> str:
        if self._processes == 1:
            return f"1, on the {self._kind}"
        each = self._processes // self._nodes
        nodes = f" ({self._nodes} nodes of {each})" if self._nodes > 1 else ""
        return f"{self._processes}{nodes} on {self._kind}s, tried with one"

    def _memory_in_words(self) -> str:
        if self._measured_on == "GPU":
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            said = f"{_size(self._memory)} of the GPU's {_size(total)} at the peak"
        else:
            said = f"{_size(self._memory)} of a process at the peak, {_size(self._before)} before the first step"
            said += "; a GPU was not tried" if self._kind == "GPU" else ""
        if self._strategy != "auto" and not str(self._strategy).startswith("ddp"):
            said += "; with all weights in one process"
        return said


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above that exists, if files can be written into it."""
    place = folder
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            f"--run_dir {folder} cannot be written to ({place}: {error.strerror}): choose another folder"
        ) from None
    return place


def _devices(accelerator: Any, devices: Any) -> tuple[str, list[int]]:
    """GPU or CPU, and the numbers of the devices of a node."""
    here = torch.cuda.device_count()
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and here > 0)
    if isinstance(devices, str) and "," in devices:
        devices = [int(word) for word in devices.split(",") if word.strip()]
    if isinstance(devices, list):
        numbers = [int(number) for number in devices]
    else:
        count = -1 if devices == "auto" else int(devices)
        numbers = [*range(count if count > 0 else (max(here, 1) if on_gpu else 1))]
    return "GPU" if on_gpu else "CPU", numbers or [0]


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _peak(device: torch.device) -> int:
    """Bytes: of the GPU that tensors took at most, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _size(count: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.3g} {units[0]}"
