#!/usr/bin/env python3
"""Kill runs again and again, go on with them each time, and compare each with one that was left alone.

    python scripts/kill_resume.py --kills 40
    python scripts/kill_resume.py --kills 4 --configurations importance_times batch_norm

The kills are shared out among configurations that differ in what a run must remember. All train a tiny model on the
embedded digits, with validations, a best checkpoint, early stopping, a learning rate that changes, and a last.ckpt
every five steps. Kills take turns: SIGKILL at a random moment, SIGKILL at a random moment of writing a checkpoint,
SIGTERM at a random moment. Each resumption has another --seed_everything. Compared are the last and the best checkpoint
to the bit, with all counts and all states of callbacks, what TensorBoard shows, and the bound that ``ddpm test``
measures. Exit status 1 if anything differs or a checkpoint is lost.

A run is a process of its own: a fork of one that has imported everything, and has not looked at a GPU.
"""

import importlib.util
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from ddpm_lightning.checkpoints.files import last_good, read_checkpoint
from ddpm_lightning.cli import main as ddpm
from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import InputError, at_least

ROOT = Path(__file__).resolve().parents[1]
STEPS_A_KILL = 20
KINDS = ("SIGKILL", "while writing", "SIGTERM")
STRATEGIES = {"ddp": "ddp", "fsdp": '{"class_path":"ddpm_lightning.training.sharding.ShardedStrategy"}'}
CLOCKS = ("train/images_per_second",)  # differ between any two runs
# the loop over validations counts anew in each epoch, and nothing reads its counts
UNCOUNTED = ".loops.epoch_loop.val_loop"

COMMON = """--data.batch_size=160 --data.limit_val=8 --data.limit_test=8 --model.ema_decay=0.9
    --model.optimizer.lr=0.02 --model.lr_scheduler=StepLR --model.lr_scheduler.step_size=20
    --model.lr_scheduler.gamma=0.9 --trainer.accelerator=cpu --trainer.check_val_every_n_epoch=1
    --trainer.log_every_n_steps=3 --trainer.max_epochs=-1 --trainer.callbacks=[]
    --trainer.callbacks+=LastCheckpoint --trainer.callbacks.every_n_train_steps=5
    --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename=best
    --trainer.callbacks.monitor=val/bits_per_dim --trainer.callbacks.enable_version_counter=false
    --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/bits_per_dim
    --trainer.callbacks.patience=10000 --trainer.callbacks+=LearningRateMonitor --trainer.callbacks+=ImagesPerSecond"""
DIGITS = f"-c {ROOT}/configs/digits.yaml --model.network.width=8 --model.network.blocks=1 --model.schedule.T=12"
HIERARCHY = f"-c {ROOT}/configs/hvae_digits.yaml"
BATCH_NORM = "--model.network=kill_resume.BatchNormNet --model.network.width=8"
TIMES = "--model.objective.times"
ACCUMULATE = "--trainer.accumulate_grad_batches"
CONFIGURATIONS = {
    "importance_times": f"{BATCH_NORM} {TIMES}=ImportanceTimes {TIMES}.bins=4 {TIMES}.history=4 {ACCUMULATE}=2",
    "accumulation": f"{ACCUMULATE}=3 --trainer.val_check_interval=4",
    "mid_epoch_validation": f"{BATCH_NORM} --trainer.val_check_interval=0.5",
    "sample_quality": f"""{BATCH_NORM} --trainer.callbacks+=SampleQuality --trainer.callbacks.n=8
        --trainer.callbacks.steps=2""",
    "learned_schedule": f"""--model.schedule=LearnedGamma --model.schedule.T=12 --model.decoder=CategoricalDecoder
        --model.objective=ContinuousNegativeElbo {TIMES}=EquispacedTimes {ACCUMULATE}=2""",
    "classes": "--model.class_conditional=true --model.network.num_classes=10 --model.label_dropout=0.3",
    "batch_norm": f"{BATCH_NORM} {ACCUMULATE}=3",
    "hierarchy": f"--model.objective.warmup=30 --model.objective.free_nats=0.5 {ACCUMULATE}=2",
}
"""What each adds to the command line."""


class BatchNormNet(nn.Module):
    """Two convolutions with a BatchNorm, whose statistics each forward pass changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.norm = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time_channel = t.float().view(-1, 1, 1, 1).expand_as(x)
        out: Tensor = self.last(self.norm(self.first(torch.cat([x, time_channel], 1))).relu())
        return out


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What a nest of dicts and lists holds, each with its place."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{name}.{key}")
    else:
        yield name, value


def same(a: Any, b: Any) -> bool:
    """Equal, tensors to the bit."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    as_bytes = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def differences(a: dict[str, Any], b: dict[str, Any], name: str) -> list[str]:
    """Places of what is not the same."""
    return [f"{name}{key}" for key in {**a, **b} if not (key in a and key in b and same(a[key], b[key]))]


class Training:
    """A run's folder, and the processes that work in it."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.folder, self.options, self.last = folder, options, folder / "checkpoints" / "last.ckpt"
        folder.mkdir(parents=True)

    def start(self, command: str, *options: str) -> None:
        """``ddpm`` in a process group of its own, its output in a file."""
        self.log = self.folder / f"{command}.out"
        arguments = [command, *self.options, f"--run_dir={self.folder}", *options]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ddpm_lightning.cli"])
        self.process = context.Process(target=become_ddpm, args=(arguments, self.log))
        self.process.start()

    def fit(self, seed: int) -> None:
        """Start training, or go on with it."""
        self.start("fit", "--ckpt_path=last", f"--seed_everything={seed}")

    def ended(self, expected: int = 0) -> None:
        """Wait for the end; another exit status than expected is an InputError."""
        self.process.join()
        if (status := self.process.exitcode) != expected:
            tail = self.log.read_text()[-3000:]
            raise InputError(f"a run ended with status {status} instead of {expected}:\n{tail}")

    def reaches(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; False where the process ended first."""
        while not condition():
            if not self.process.is_alive():
                return False
            time.sleep(0.0002)
        return True

    def version(self) -> int:
        """Of last.ckpt: it changes whenever that is written."""
        try:
            return self.last.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def kill(self, kind: str, chance: random.Random) -> bool:
        """Let it write a checkpoint or a few, then kill it; False where it ended before."""
        for _ in range(chance.randint(1, 2)):
            before, began = self.version(), time.monotonic()
            if not self.reaches(lambda before=before: self.version() != before):  # type: ignore[misc]
                return False
        interval = min(time.monotonic() - began, 0.5)
        if kind == "while writing":
            if not self.reaches(self.last.with_name("last.ckpt.part").exists):
                return False
            interval = 0.003
        time.sleep(chance.uniform(0, interval))
        assert self.process.pid is not None
        try:
            os.killpg(self.process.pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def checkpoint(self, name: str) -> dict[str, Any]:
        """All of a checkpoint that must not depend on kills, each with its place."""
        content, folder = read_checkpoint(self.last.with_name(f"{name}.ckpt")), str(self.folder)
        content["loops"] = content["loops"]["fit_loop"]
        return {
            key.replace(folder, "RUN"): value.replace(folder, "RUN") if isinstance(value, str) else value
            for key, value in leaves(content)
            # Lightning does not restore the last one, and nothing reads it
            if not (key.startswith(UNCOUNTED) or key.endswith(".current_score"))
        }

    def scalars(self) -> set[tuple[str, int, float]]:
        """What TensorBoard shows: tag, step, value."""
        events = EventAccumulator(str(self.folder), size_guidance={"scalars": 0}).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag not in CLOCKS and not tag.startswith("test/")]
        return {(tag, event.step, event.value) for tag in tags for event in events.Scalars(tag)}

    def bound(self) -> dict[str, Any]:
        """What ``ddpm test`` writes of the best checkpoint."""
        self.start("test", "--ckpt_path=best")
        self.ended()
        return dict(leaves(json.loads((self.folder / "bound-test.json").read_text())))


def become_ddpm(arguments: list[str], log: Path) -> None:
    """What the fork does."""
    os.setsid()
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    torch.set_num_threads(1)
    # for Lightning, which starts a run's other processes by the command of the first
    paths = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    sys.argv[1:] = arguments
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("ddpm_lightning.__main__")
    ddpm(arguments)


def compare(name: str, straight: Training, broken: Training, kills: int) -> list[str]:
    """Print and return what differs between two finished runs."""
    found = []
    for which in ("last", "best"):
        a, b = straight.checkpoint(which), broken.checkpoint(which)
        found += differences(a, b, f"{which}.ckpt")
    shown = straight.scalars()
    found += [f"TensorBoard {tag} at step {step}" for tag, step, _ in sorted(shown ^ broken.scalars())]
    found += differences(straight.bound(), broken.bound(), "bound-test.json")
    score = next(value for key, value in a.items() if key.endswith(".best_model_score") and isinstance(value, Tensor))
    counted = sum(isinstance(value, Tensor) for value in a.values())
    print(
        f"{name}: {kills} kills, best after {b['.global_step']} steps ({float(score):.6f}), {counted} tensors, "
        f"{len(shown)} points of TensorBoard, {f'{len(found)} DIFFER' if found else 'EQUAL'}",
        *(f"differs: {difference}" for difference in found[:10]),
        sep="\n",
        flush=True,
    )
    return found


def main(
    kills: int = 40,
    configurations: list[str] | None = None,
    seed: int = 0,
    devices: int = 1,
    strategy: Literal["ddp", "fsdp"] = "ddp",
) -> int:
    """Run, kill, resume, compare.

    Args:
        kills: number of kills, of all configurations
        configurations: some of the configurations, by default all
        seed: seed of the moments
        devices: processes of each run
        strategy: of several processes
    """
    names = configurations or list(CONFIGURATIONS)
    if unknown := set(names) - set(CONFIGURATIONS):
        raise InputError(f"--configurations {' '.join(unknown)}: there are {' '.join(CONFIGURATIONS)}")
    at_least(len(names), "one for each configuration", kills=kills)
    at_least(1, devices=devices)
    several = f"--trainer.devices={devices} --trainer.strategy={STRATEGIES[strategy]}" if devices > 1 else ""
    chance, lost, done, found = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(names, start=1):
            share = kills * place // len(names) - done
            base = HIERARCHY if name == "hierarchy" else DIGITS
            options = (
                f"{base} {COMMON} {CONFIGURATIONS[name]} --trainer.max_steps={STEPS_A_KILL * (share + 1)} {several}"
            )
            straight, broken = (
                Training(Path(folder) / name / which, options.split()) for which in ("straight", "broken")
            )
            straight.fit(0)
            straight.ended()
            newest = 0
            for number in range(1, share + 1):
                kind = KINDS[done % len(KINDS)]
                # the first seed is that of the run left alone: it makes the initial weights
                broken.fit(number - 1)
                if not broken.kill(kind, chance):
                    broken.ended()
                    raise InputError(f"{name} was over before kill {number}: another --seed, or more steps a kill")
                broken.ended(143 if kind == "SIGTERM" else -signal.SIGKILL)
                last = last_good(broken.last.parent)
                step = 0 if last is None else read_checkpoint(last)["global_step"]
                print(f"{name}, kill {number}, {kind}: {last and last.name} of step {step}", flush=True)
                lost += last != broken.last or step < newest
                newest, done = step, done + 1
            broken.fit(share)
            broken.ended()
            found += len(compare(name, straight, broken, share))
    print(f"{done} kills of {len(names)} configurations, {devices} processes, seed {seed}; lost: {lost}")
    # what one resumption gets wrong, those after it do not put right
    print(f"{found} differences" if found else "all runs are equal to those left alone")
    return int(bool(found or lost))


if __name__ == "__main__":
    run_script(main, __doc__)
