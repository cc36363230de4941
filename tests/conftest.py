"""What several test files share."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from processes import ROOT, run_ddpm, run_ddpm_pair, run_ddpm_process, run_pair, run_script

__all__ = ["ROOT", "run_ddpm", "run_ddpm_pair", "run_ddpm_process", "run_pair", "run_script"]

# several test processes share the cores; and sums then do not depend on how many cores there are
torch.set_num_threads(1)
# tests compare bits; a GPU's convolutions would otherwise sum in an order that varies
torch.backends.cudnn.deterministic = True


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
    """The folder of a run of two epochs. It is trained once, and each test process has a copy of it."""
    own = tmp_path_factory.getbasetemp()
    session = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    shared, copy = session / "shared-run", own / "run"
    with FileLock(session / "shared-run.lock"):
        if not (shared / "stdout.txt").is_file():
            output = run_ddpm("fit", *tiny, f"--run_dir={shared}", "--trainer.max_epochs=2")
            (shared / "stdout.txt").write_text(output)
    shutil.copytree(shared, copy)
    # the copy is a run where it lies
    for name in ("config.yaml", "stdout.txt"):
        (copy / name).write_text((copy / name).read_text().replace(str(shared), str(copy)))
    return copy


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Lightning leaves the process group of a strategy: what is measured after it would be gathered in that."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_collection_finish() -> None:
    """What is imported by now stays: to look through it again and again was a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
