#!/usr/bin/env python3
"""Kill processes that torchrun has started, and compare the run with one that was left alone.

    python scripts/elastic_restart.py

Two processes train a tiny model on the embedded digits, with a last.ckpt every five steps. Four runs:

    straight      two processes, left alone
    restarted     the first process is killed, later the second; torchrun starts both again each time
    two to one    both are killed with their torchrun, and one process goes on with the same batches
    fewer nodes   torchrun --nnodes 1:2, two nodes of one process on this machine; one node is killed, the other goes on

Compared is the last checkpoint: to the bit where the processes stayed two, else by the largest relative difference of a
tensor of weights. Exit status 1 if "restarted" has other bits, or the others differ by more than --tolerance.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from kill_resume import ROOT, leaves, same

from ddpm_lightning.checkpoints.files import read_checkpoint
from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import InputError

OPTIONS = f"""fit -c {ROOT}/configs/digits.yaml --model.network.width=8 --model.network.blocks=1 --model.schedule.T=12
    --data.batch_size=160 --data.limit_val=8 --trainer.accelerator=cpu --trainer.logger=false
    --trainer.check_val_every_n_epoch=1 --trainer.max_epochs=-1 --trainer.callbacks=[]
    --trainer.callbacks+=LastCheckpoint --trainer.callbacks.every_n_train_steps=5 --ckpt_path=last"""
FOUND_SOONER = "--rdzv_conf=last_call_timeout=3,join_timeout=60,timeout=60,keep_alive_interval=1"
"""A node that is gone is missed after seconds."""


class Elastic:
    """A run's folder, and the torchruns that train in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.last = folder, folder / "checkpoints" / "last.ckpt"
        folder.mkdir()

    def start(self, steps: int, *options: str) -> subprocess.Popen[bytes]:
        """``torchrun`` in a process group of its own; all output goes into one file."""
        command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "ddpm_lightning", *OPTIONS.split()]
        command += [f"--run_dir={self.folder}", f"--trainer.max_steps={steps}"]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def step(self) -> int:
        """Of the last checkpoint."""
        return int(read_checkpoint(self.last)["global_step"]) if self.last.is_file() else 0

    def wait(self, reached: Callable[[], bool], agent: subprocess.Popen[bytes]) -> None:
        """Until something is so; an InputError if torchrun ends before."""
        while not reached():
            if agent.poll() is not None:
                raise InputError(f"{self.folder.name} ended too soon:\n{self.log()}")
            time.sleep(0.05)

    def ended(self, agent: subprocess.Popen[bytes]) -> None:
        """Wait for a good end."""
        if agent.wait() != 0:
            raise InputError(f"{self.folder.name} ended with status {agent.returncode}:\n{self.log()}")

    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")[-4000:]


def worker(agent: int, rank: int) -> int | None:
    """The process of a rank among the children of torchrun."""
    try:
        for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                return int(child)
    except OSError:  # ended meanwhile
        pass
    return None


def restarted(run: Elastic, steps: int) -> None:
    """Each process is killed once."""
    agent = run.start(steps, "--nproc_per_node=2", "--max_restarts=3")
    for kill, rank in enumerate((0, 1), start=1):
        run.wait(lambda kill=kill: run.step() >= steps * kill // 3, agent)  # type: ignore[misc]
        pid = worker(agent.pid, rank)
        assert pid is not None, "a run that writes checkpoints has processes"
        os.kill(pid, signal.SIGKILL)
        print(f"restarted: process {rank} killed after step {run.step()}", flush=True)
        run.wait(lambda pid=pid, rank=rank: worker(agent.pid, rank) not in (None, pid), agent)  # type: ignore[misc]
    run.ended(agent)


def two_to_one(run: Elastic, steps: int) -> None:
    """Everything is killed; one process goes on."""
    agent = run.start(steps, "--nproc_per_node=2")
    run.wait(lambda: run.step() >= steps // 2, agent)
    for pid in [worker(agent.pid, 0), worker(agent.pid, 1), agent.pid]:
        os.kill(pid or agent.pid, signal.SIGKILL)
    agent.wait()
    print(f"two to one: both killed after step {run.step()}", flush=True)
    run.ended(run.start(steps, "--nproc_per_node=1"))


def fewer_nodes(run: Elastic, steps: int) -> None:
    """A node goes, and the other trains on alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = ["--nnodes=1:2", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d", FOUND_SOONER]
    nodes += [f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=elastic", "--local_addr=localhost"]
    first = run.start(steps, *nodes)
    time.sleep(1)  # it has the store that both meet at
    second = run.start(steps, *nodes)
    run.wait(lambda: run.step() >= steps // 2, first)
    gone = [worker(second.pid, rank) for rank in (0, 1)]
    if gone == [None, None]:
        raise InputError(f"fewer nodes: the second node did not train:\n{run.log()}")
    for pid in [*filter(None, gone), second.pid]:
        os.kill(pid, signal.SIGKILL)
    second.wait()
    print(f"fewer nodes: a node killed after step {run.step()}", flush=True)
    run.ended(first)


def compare(name: str, straight: Elastic, other: Elastic) -> tuple[bool, float]:
    """Print and return whether all tensors and counts are equal, and the largest relative difference of weights."""
    a, b = (dict(leaves(read_checkpoint(run.last))) for run in (straight, other))
    keys = [
        key for key in a if key.startswith((".state_dict.", ".optimizer_states.", ".lr_schedulers", ".global_step"))
    ]
    equal = all(key in b and same(a[key], b[key]) for key in keys)
    weights = [key for key in keys if key.startswith(".state_dict.") and a[key].is_floating_point()]
    worst = max(float((a[key] - b[key]).norm() / a[key].norm().clamp(min=1e-30)) for key in weights)
    print(f"{name}: {len(keys)} values {'EQUAL to the bit' if equal else f'differ, weights by {worst:.1e} at most'}")
    return equal, worst


def main(steps: int = 60, tolerance: float = 1e-4, runs: list[str] | None = None) -> int:
    """Train, kill, compare.

    Args:
        steps: of each run
        tolerance: on the weights where the number of processes changed
        runs: some of restarted, two_to_one, fewer_nodes; by default all
    """
    torch.set_num_threads(1)
    ways: dict[str, Callable[[Elastic, int], None]] = {
        each.__name__: each for each in (restarted, two_to_one, fewer_nodes)
    }
    if unknown := {*(runs or ())} - {*ways}:
        raise InputError(f"--runs {' '.join(unknown)}: there are {', '.join(ways)}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        straight = Elastic(Path(folder) / "straight")
        straight.ended(straight.start(steps, "--nproc_per_node=2"))
        for name in runs or ways:
            other = Elastic(Path(folder) / name)
            ways[name](other, steps)
            equal, worst = compare(name.replace("_", " "), straight, other)
            failed |= not (equal if name == "restarted" else worst <= tolerance)
    return int(failed)


if __name__ == "__main__":
    run_script(main, __doc__)
