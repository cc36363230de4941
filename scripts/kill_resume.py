"""Kill a run again and again, go on with it each time, and compare it bit for bit with one that was left alone.

    python scripts/kill_resume.py --kills 20

Both runs train a tiny model on the embedded digits, with accumulated gradients, a learning rate that changes, and a
checkpoint every five steps. Kills take turns: SIGKILL at a random moment, SIGKILL at a random moment of writing a
checkpoint, SIGTERM at a random moment. Each resumption has another --seed_everything. Exit status 1 if anything differs
or a checkpoint is lost.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddpm_lightning.checkpoints.files import last_good, read_checkpoint
from ddpm_lightning.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
EVERY = 5  # steps between checkpoints
STEPS_A_KILL = 30  # a process start needs some steps before and after it
STRATEGIES = {"ddp": "ddp", "fsdp": "{class_path: ddpm_lightning.training.sharding.ShardedStrategy}"}
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


def start(run_dir: Path, steps: int, devices: int, seed: int, strategy: str) -> subprocess.Popen[str]:
    """A run, or what is left of it, in a process group of its own."""
    callback = "ddpm_lightning.callbacks.LastCheckpoint"
    options = {
        "-c": "configs/digits.yaml",
        "--run_dir": run_dir,
        "--ckpt_path": "last",
        "--seed_everything": seed,
        "--data.batch_size": 64,
        "--data.limit_val": 8,
        "--model.network.init_args.width": 8,
        "--model.network.init_args.blocks": 1,
        "--model.schedule.init_args.T": 12,
        "--model.ema_decay": 0.9,
        "--model.lr_scheduler": "{class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 20, gamma: 0.9}}",
        "--trainer.accelerator": "cpu",
        "--trainer.accumulate_grad_batches": 2,
        "--trainer.check_val_every_n_epoch": 3,
        "--trainer.max_epochs": -1,
        "--trainer.max_steps": steps,
        "--trainer.callbacks": f"[{{class_path: {callback}, init_args: {{every_n_train_steps: {EVERY}}}}}]",
        "--trainer.logger": "false",
    }
    if devices > 1:
        options |= {"--trainer.devices": devices, "--trainer.strategy": STRATEGIES[strategy]}
    arguments = [str(word) for option in options.items() for word in option]
    return subprocess.Popen(
        [sys.executable, "-m", "ddpm_lightning", "fit", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(run: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """False where the run ended first."""
    while not condition():
        if run.poll() is not None:
            return False
        time.sleep(0.0002)
    return True


def kill(run: subprocess.Popen[str], run_dir: Path, kind: str, chance: random.Random) -> bool:
    """Let the run write a checkpoint or a few, then kill it; False where it ended before."""
    last = run_dir / "checkpoints" / "last.ckpt"
    part = last.with_name("last.ckpt.part")

    def version() -> int:
        try:
            return last.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    began = time.monotonic()
    for _ in range(chance.randint(1, 3)):
        before, began = version(), time.monotonic()
        if not wait_until(run, lambda before=before: version() != before):
            return False
    interval = min(time.monotonic() - began, 0.5)
    if kind == "while writing":
        if not wait_until(run, part.exists):
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
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and torch.equal(_bytes(a), _bytes(b)) else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in {**a, **b} for d in differences(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}.{i}")]
    return [] if a == b else [name]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def tensors(value: Any) -> int:
    """Number of tensors in a nest of lists and dicts."""
    if isinstance(value, dict | list | tuple):
        return sum(map(tensors, value.values() if isinstance(value, dict) else value))
    return int(isinstance(value, torch.Tensor))


def finish(run: subprocess.Popen[str], status: int) -> None:
    """Wait for the end of a run.

    Raises:
        InputError: another exit status than expected.
    """
    output = run.communicate()[0]
    if run.returncode != status:
        raise InputError(f"a run ended with status {run.returncode} instead of {status}:\n{output[-3000:]}")


def main() -> int:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--devices", type=int, default=1, help="processes of each run (default 1)")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="of several processes (default ddp)")
    options = parser.parse_args()
    if options.kills < 1 or options.devices < 1:
        parser.error("--kills and --devices must be 1 or more")
    chance, steps = random.Random(options.seed), STEPS_A_KILL * (options.kills + 1)
    with tempfile.TemporaryDirectory() as folder:
        straight, broken = Path(folder) / "straight", Path(folder) / "broken"
        try:
            finish(start(straight, steps, options.devices, 0, options.strategy), 0)
            kinds, lost = torture(broken, steps, options, chance)
            a, b = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (straight, broken))
        except InputError as error:
            print(f"kill_resume: error: {error}", file=sys.stderr)
            return 1
        found = differences({key: a[key] for key in COMPARED}, {key: b[key] for key in COMPARED})
    averaged = sum(name.startswith("ema_model.") for name in a["state_dict"])
    print(f"{options.kills} kills of {options.devices} processes, seed {options.seed}: {kinds}")
    print(
        f"compared after {b['global_step']} steps: {tensors(a['state_dict'])} tensors of the state dict, {averaged} of "
        f"them averaged, {tensors(a['optimizer_states'])} of the optimiser, the scheduler and the counts"
    )
    # what one resumption gets wrong, those after it do not put right
    equal = "none" if found else str(options.kills)
    print(f"resumes that are bitwise equal: {equal} of {options.kills}; lost checkpoints: {lost}")
    for name in found[:10]:
        print(f"differs: {name}")
    return int(bool(found) or lost > 0)


def torture(
    run_dir: Path, steps: int, options: argparse.Namespace, chance: random.Random
) -> tuple[dict[str, int], int]:
    """Kill a run as often as asked for and let it end; the kills by kind, and the checkpoints lost.

    Raises:
        InputError: a run failed by itself, or was over before its time.
    """
    kinds, lost, newest = dict.fromkeys(("SIGKILL", "while writing", "SIGTERM"), 0), 0, 0
    for number in range(options.kills):
        kind = list(kinds)[number % len(kinds)]
        # the first one's is the other run's: it makes the initial weights
        run = start(run_dir, steps, options.devices, number, options.strategy)
        if not kill(run, run_dir, kind, chance):
            finish(run, 0)
            raise InputError(f"the run was over before kill {number + 1}: another --seed, or more steps a kill")
        finish(run, 143 if kind == "SIGTERM" else -signal.SIGKILL)
        kinds[kind] += 1
        last = run_dir / "checkpoints" / "last.ckpt"
        found = last_good(last.parent)
        step = 0 if found is None else read_checkpoint(found)["global_step"]
        print(f"kill {number + 1}, {kind}: {found.name if found else 'no checkpoint'} of step {step}", flush=True)
        lost += found != last or step < newest
        newest = step
    finish(start(run_dir, steps, options.devices, options.kills, options.strategy), 0)
    return kinds, lost


if __name__ == "__main__":
    sys.exit(main())
