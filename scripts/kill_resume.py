"""Kill runs again and again, go on with them each time, and compare each with one that was left alone.

    python scripts/kill_resume.py --kills 40
    python scripts/kill_resume.py --kills 4 --configurations importance_times batch_norm

The kills are shared out among configurations that differ in what a run must remember. All train a tiny model on the
embedded digits, with validations, a best checkpoint, early stopping, a learning rate that changes, and a last.ckpt
every five steps. Kills take turns: SIGKILL at a random moment, SIGKILL at a random moment of writing a checkpoint,
SIGTERM at a random moment. Each resumption has another --seed_everything. Compared are the last and the best checkpoint
to the bit, with all counts and all states of callbacks, what TensorBoard shows, and the bound that ``ddpm test``
measures. Exit status 1 if anything differs or a checkpoint is lost.

A run is a process of its own: a fork of this one, which has imported everything; with --devices 2 a new one.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from ddpm_lightning.checkpoints.files import last_good, read_checkpoint
from ddpm_lightning.cli import main as ddpm
from ddpm_lightning.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
EVERY = 5  # steps between checkpoints
STEPS_A_KILL = 20
KINDS = ("SIGKILL", "while writing", "SIGTERM")
STRATEGIES = {"ddp": "ddp", "fsdp": "{class_path: ddpm_lightning.training.sharding.ShardedStrategy}"}
CLOCKS = ("train/images_per_second",)  # differ between any two runs
# the loop over validations counts anew in each epoch, and nothing reads its counts
UNCOUNTED = "epoch_loop.val_loop"

_OBJECTIVE = "--model.objective"
_TIMES = f"{_OBJECTIVE}.init_args.times"
_PARTS = "ddpm_lightning.objectives"
_BATCH_NORM = {"--model.network": "{class_path: kill_resume.BatchNormNet, init_args: {width: 8}}"}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "importance_times": {
        **_BATCH_NORM,
        _TIMES: f"{{class_path: {_PARTS}.ImportanceTimes, init_args: {{bins: 4, history: 4}}}}",
        "--trainer.accumulate_grad_batches": 2,
    },
    "accumulation": {"--trainer.accumulate_grad_batches": 3, "--trainer.val_check_interval": 4},
    "mid_epoch_validation": {**_BATCH_NORM, "--trainer.val_check_interval": 0.5},
    "sample_quality": {
        **_BATCH_NORM,
        "--trainer.callbacks+": "{class_path: ddpm_lightning.callbacks.SampleQuality, init_args: {n: 8, steps: 2}}",
    },
    "learned_schedule": {
        "--model.schedule": "{class_path: ddpm_lightning.schedules.LearnedGamma, init_args: {T: 12}}",
        "--model.decoder": "{class_path: ddpm_lightning.process.CategoricalDecoder}",
        _OBJECTIVE: f"{{class_path: {_PARTS}.ContinuousNegativeElbo}}",
        _TIMES: f"{{class_path: {_PARTS}.EquispacedTimes}}",
        "--trainer.accumulate_grad_batches": 2,
    },
    "classes": {
        "--model.class_conditional": "true",
        "--model.network.init_args.num_classes": 10,
        "--model.label_dropout": 0.3,
    },
    "batch_norm": {**_BATCH_NORM, "--trainer.accumulate_grad_batches": 3},
}


class BatchNormNet(nn.Module):
    """Two convolutions with a BatchNorm, whose statistics each forward pass changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.norm = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """eps ``[B, 1, H, W]``."""
        time_channel = t.float().view(-1, 1, 1, 1).expand_as(x)
        out: Tensor = self.last(self.norm(self.first(torch.cat([x, time_channel], 1))).relu())
        return out


def options_of(name: str, steps: int, devices: int, strategy: str) -> list[str]:
    """The command line of a configuration, without the command."""
    callbacks = [
        f"{{class_path: ddpm_lightning.callbacks.LastCheckpoint, init_args: {{every_n_train_steps: {EVERY}}}}}",
        "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {filename: best, "
        "monitor: val/denoising/bits_per_dim, enable_version_counter: false}}",
        "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: "
        "{monitor: val/denoising/bits_per_dim, patience: 10000}}",
        "{class_path: lightning.pytorch.callbacks.LearningRateMonitor}",
        "{class_path: ddpm_lightning.callbacks.ImagesPerSecond}",
    ]
    small = {"width": 8, "blocks": 1}
    options: dict[str, Any] = {
        "-c": ROOT / "configs/digits.yaml",
        "--data.batch_size": 160,
        "--data.limit_val": 8,
        "--data.limit_test": 8,
        **({f"--model.network.init_args.{key}": value for key, value in small.items()}),
        "--model.schedule.init_args.T": 12,
        "--model.ema_decay": 0.9,
        "--model.optimizer.init_args.lr": 0.02,
        "--model.lr_scheduler": "{class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 20, gamma: 0.9}}",
        "--trainer.accelerator": "cpu",
        "--trainer.check_val_every_n_epoch": 1,
        "--trainer.log_every_n_steps": 3,
        "--trainer.max_epochs": -1,
        "--trainer.max_steps": steps,
        "--trainer.callbacks": f"[{', '.join(callbacks)}]",
        **CONFIGURATIONS[name],
    }
    if devices > 1:
        options |= {"--trainer.devices": devices, "--trainer.strategy": STRATEGIES[strategy]}
    return [str(word) for option in options.items() for word in option]


class Process:
    """``ddpm`` with some arguments, in a process group of its own, its output in a file."""

    def __init__(self, arguments: list[str], log: Path, forks: bool) -> None:
        self.log = log
        if not forks:
            command = [sys.executable, "-m", "ddpm_lightning", *arguments]
            path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
            with log.open("w") as out:
                self.pid = subprocess.Popen(
                    command,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                ).pid
        elif (pid := os.fork()) == 0:
            _become_ddpm(arguments, log)
        else:
            self.pid = pid
        self._status: int | None = None

    def status(self, wait: bool) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """False where it ended first."""
        while not condition():
            if self.status(wait=False) is not None:
                return False
            time.sleep(0.0002)
        return True

    def finish(self, expected: int) -> None:
        """Wait for the end.

        Raises:
            InputError: another exit status than expected.
        """
        if (status := self.status(wait=True)) != expected:
            tail = self.log.read_text()[-3000:]
            raise InputError(f"a run ended with status {status} instead of {expected}:\n{tail}")


def _become_ddpm(arguments: list[str], log: Path) -> None:
    """Be the child of a fork; never return."""
    status = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        torch.set_num_threads(1)
        ddpm(arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def kill(run: Process, run_dir: Path, kind: str, chance: random.Random) -> bool:
    """Let the run write a checkpoint or a few, then kill it; False where it ended before."""
    last = run_dir / "checkpoints" / "last.ckpt"
    part = last.with_name("last.ckpt.part")

    def version() -> int:
        try:
            return last.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    began = time.monotonic()
    for _ in range(chance.randint(1, 2)):
        before, began = version(), time.monotonic()
        if not run.wait_until(lambda before=before: version() != before):  # type: ignore[misc]
            return False
    interval = min(time.monotonic() - began, 0.5)
    if kind == "while writing":
        if not run.wait_until(part.exists):
            return False
        time.sleep(chance.uniform(0, 0.003))
    else:
        time.sleep(chance.uniform(0, interval))
    try:
        os.killpg(run.pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of what is not the same to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and torch.equal(_bytes(a), _bytes(b)) else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in {**a, **b} for d in differences(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}.{i}")]
    return [] if a == b else [name]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def tensors(value: Any) -> int:
    """Number of tensors in a nest of lists and dicts."""
    if isinstance(value, dict | list | tuple):
        return sum(map(tensors, value.values() if isinstance(value, dict) else value))
    return int(isinstance(value, Tensor))


def checkpoint(run_dir: Path, name: str) -> dict[str, Any]:
    """All of a checkpoint that must not depend on kills."""
    content = read_checkpoint(run_dir / "checkpoints" / f"{name}.ckpt")
    fit = content["loops"]["fit_loop"]
    content["loops"] = {key: value for key, value in fit.items() if not key.startswith(UNCOUNTED)}
    content["callbacks"] = _within(run_dir, content["callbacks"])
    for state in content["callbacks"].values():
        state.pop("current_score", None)  # Lightning does not restore it, and nothing reads it
    return content


def _within(run_dir: Path, value: Any) -> Any:
    """A nest of containers with the run's folder taken out of its strings."""
    if isinstance(value, dict):
        return {_within(run_dir, key): _within(run_dir, item) for key, item in value.items()}
    return value.replace(str(run_dir), "RUN") if isinstance(value, str) else value


def scalars(run_dir: Path) -> set[tuple[str, int, float]]:
    """What TensorBoard shows: tag, step, value."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in CLOCKS and not tag.startswith("test/")]
    return {(tag, event.step, event.value) for tag in tags for event in events.Scalars(tag)}


class Case:
    """One configuration: a run that is left alone, one that is killed, and what differs between them."""

    def __init__(self, name: str, kills: int, first: int, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.kills, self.first, self.folder = name, kills, first, folder
        steps = STEPS_A_KILL * (kills + 1)
        self.options = options_of(name, steps, options.devices, options.strategy)
        self.forks = options.devices == 1
        self.lost = 0

    def start(self, run_dir: Path, seed: int) -> Process:
        """A run, or what is left of it."""
        run_dir.mkdir(parents=True, exist_ok=True)
        command = ["fit", *self.options, "--run_dir", str(run_dir)]
        # the first one's seed is that of the run left alone: it makes the initial weights
        command += ["--ckpt_path", "last", "--seed_everything", str(seed)]
        return Process(command, run_dir / "out.txt", self.forks)

    def run(self, chance: random.Random) -> list[str]:
        """Do it; what differs.

        Raises:
            InputError: a run failed by itself, or was over before its time.
        """
        straight, broken = self.folder / "straight", self.folder / "broken"
        self.start(straight, 0).finish(0)
        newest = 0
        for number in range(self.kills):
            kind = KINDS[(self.first + number) % len(KINDS)]
            run = self.start(broken, number)
            if not kill(run, broken, kind, chance):
                run.finish(0)
                raise InputError(f"the run was over before kill {number + 1}: another --seed, or more steps a kill")
            run.finish(143 if kind == "SIGTERM" else -signal.SIGKILL)
            last = broken / "checkpoints" / "last.ckpt"
            found = last_good(last.parent)
            step = 0 if found is None else read_checkpoint(found)["global_step"]
            what = found.name if found else "no checkpoint"
            print(f"{self.name}, kill {number + 1}, {kind}: {what} of step {step}", flush=True)
            self.lost += found != last or step < newest
            newest = step
        self.start(broken, self.kills).finish(0)
        return self.compare(straight, broken)

    def compare(self, straight: Path, broken: Path) -> list[str]:
        """What differs between two finished runs."""
        found = []
        for name in ("last", "best"):
            a, b = checkpoint(straight, name), checkpoint(broken, name)
            found += differences(a, b, f"{name}.ckpt")
        shown = scalars(straight), scalars(broken)
        found += [f"TensorBoard {tag} at step {step}" for tag, step, _ in sorted(shown[0] ^ shown[1])]
        bounds = []
        for run_dir in (straight, broken):
            command = ["test", *self.options, "--run_dir", str(run_dir), "--ckpt_path", "best"]
            Process(command, run_dir / "test.txt", self.forks).finish(0)
            bounds.append(json.loads((run_dir / "bound-test.json").read_text()))
        found += differences(bounds[0], bounds[1], "bound-test.json")
        best = [c["callbacks"] for c in (checkpoint(straight, "best"), checkpoint(broken, "best"))]
        score = next(float(state["best_model_score"]) for key, state in best[0].items() if "ModelCheckpoint" in key)
        verdict = f"{len(found)} DIFFER" if found else "EQUAL"
        print(
            f"{self.name}: {self.kills} kills, best after {b['global_step']} steps ({score:.6f}), "
            f"{tensors(a)} tensors, {len(shown[0])} points of TensorBoard, {verdict}",
            flush=True,
        )
        for difference in found[:10]:
            print(f"differs: {difference}", flush=True)
        return found


def main() -> int:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="number of kills, of all configurations (default 40)")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--devices", type=int, default=1, help="processes of each run (default 1)")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="of several processes (default ddp)")
    options = parser.parse_args()
    names, devices = options.configurations, options.devices
    if options.kills < len(names) or devices < 1:
        parser.error(f"--kills must be {len(names)} or more, one for each configuration, and --devices 1 or more")
    chance, found, lost, done = random.Random(options.seed), [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            kills = (options.kills * (number + 1)) // len(names) - done
            case = Case(name, kills, done, Path(folder) / name, options)
            try:
                found += [f"{name}: {difference}" for difference in case.run(chance)]
            except InputError as error:
                print(f"kill_resume: error: {name}: {error}", file=sys.stderr)
                return 1
            lost, done = lost + case.lost, done + kills
    print(f"{done} kills of {len(names)} configurations, {devices} processes, seed {options.seed}; lost: {lost}")
    # what one resumption gets wrong, those after it do not put right
    print("all runs are equal to those left alone" if not found else f"{len(found)} differences")
    return int(bool(found) or lost > 0)


if __name__ == "__main__":
    sys.exit(main())
