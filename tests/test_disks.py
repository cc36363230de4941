"""A disk that is full, read-only or gone: one sentence and status 1, wherever a run writes."""

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from processes import run_ddpm

from ddpm_lightning.errors import RunError
from ddpm_lightning.runs import Run
from ddpm_lightning.runs.disk import disk_errors_in


@contextmanager
def _no_file_above(size: int) -> Iterator[None]:
    """The system refuses to write more than that many bytes into a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "named"),
    [(0, ".lock"), (60, ""), (2_000, "forward.png"), (100_000, "best.ckpt")],
    ids=["lock", "tensorboard", "pictures", "checkpoint"],
)
def test_a_full_disk_ends_training_with_one_sentence(size: int, named: str, tiny: list[str], tmp_path: Path) -> None:
    options = ["--trainer.max_epochs=1", "--data.limit_val=20", "--trainer.log_every_n_steps=1"]
    with _no_file_above(size):
        output = run_ddpm("fit", *tiny, f"--run_dir={tmp_path / 'run'}", *options, expect=1)
    assert "Traceback" not in output
    line = output.splitlines()[-1]
    assert line.startswith(f"ddpm: error: {tmp_path / 'run'}") and named in line
    assert "File too large" in line and "the last good checkpoint is none" in line


@pytest.mark.parametrize("command", ["test", "predict"])
def test_tables_on_a_full_disk(command: str, trained: Path) -> None:
    with _no_file_above(200):
        output = run_ddpm(command, str(trained), "--trainer.logger=false", "--data.limit_test=20", expect=1)
    assert "Traceback" not in output
    assert f"cannot be written (File too large); the last good checkpoint is {trained}/checkpoints/last" in output


@pytest.mark.parametrize("content", ["text", {"a": 1}, torch.zeros(3, 8, 8, dtype=torch.uint8)])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_what_a_run_writes_is_there_whole_or_not_at_all(
    number: int, content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("ddpm_lightning.runs.run.os.replace", full)
    with pytest.raises(RunError, match=os.strerror(number)):
        Run(tmp_path).write("name.png", content)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "samples").touch()
    with pytest.raises(RunError, match=r"samples/a.png cannot be written \(.*; the last good checkpoint is none"):
        Run(tmp_path).write("samples/a.png", "")
    with pytest.raises(RunError, match="File exists"), Run(tmp_path / "samples").lock():
        pass


def test_a_folder_that_is_removed_during_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(RunError, match=r"run/events cannot be written \(No such file"), disk_errors_in(folder):
        shutil.rmtree(folder)
        (folder / "events").open("a")


def test_missing_data_are_no_matter_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors_in(tmp_path / "run"):
        (tmp_path / "images.pt").open()


def test_the_first_of_two_errors_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the checkpoint"), disk_errors_in(tmp_path):
        try:
            raise RunError("the checkpoint")
        finally:
            raise OSError(errno.ENOSPC, "the logger")
