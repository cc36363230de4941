"""What several test files share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# several test processes share the cores; and sums then do not depend on how many cores there are
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]


def run_ddpm(*arguments: str, expect: int = 0, cwd: Path = ROOT, **environment: str) -> str:
    """Run the command line in a process of its own and return all it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_lightning", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == expect, done.stdout[-4000:]
    return done.stdout


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options that make the digits' configuration train in a second."""
    return [
        "-c",
        "configs/digits.yaml",
        "--model.network.init_args.width=8",
        "--model.network.init_args.blocks=1",
        "--model.schedule.init_args.T=12",
        "--trainer.log_every_n_steps=5",
        "--trainer.check_val_every_n_epoch=1",
    ]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """The folder of a run of two epochs."""
    run_dir = tmp_path_factory.mktemp("run")
    output = run_ddpm("fit", *tiny, f"--run_dir={run_dir}", "--trainer.max_epochs=2")
    (run_dir / "stdout.txt").write_text(output)
    return run_dir
