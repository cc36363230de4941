"""Whatever stops a program ends in one sentence, and the traceback is kept."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import run_ddpm, run_script
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ddpm_lightning.cli import DiffusionCLI
from ddpm_lightning.errors import InputError, RunError
from ddpm_lightning.failures import end


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (InputError("--n 0 must be 1 or more"), 2, "--n 0 must be 1 or more"),
        (MisconfigurationException("no such device"), 2, "no such device"),
        (RunError("the disk is full"), 1, "the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_foreseen_leaves_no_file(
    error: BaseException, status: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(raised(error), "ddpm", tmp_path) == status
    assert capsys.readouterr().err == f"ddpm: error: {sentence}\n"
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError("a\nmessage\nof lines"), "RuntimeError: a message of lines"),
        (AssertionError(), "AssertionError"),
        (ValueError("x" * 1000), f"ValueError: {'x' * 300} ..."),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory is full: try a smaller batch_size"),
        (MemoryError(), "the memory is full: try a smaller batch_size"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "the memory is full: try a smaller batch_size"),
    ],
)
def test_the_rest_is_one_sentence_and_a_file(
    error: BaseException, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(raised(error), "ddpm", tmp_path) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ddpm: error: {sentence}") and said.count("\n") == 1
    assert said.endswith(f"the full traceback is in {tmp_path / 'error.txt'}\n")
    assert type(error).__name__ in (tmp_path / "error.txt").read_text()


def test_the_place_is_the_users_code_before_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end(raised(KeyError("x")), "ddpm", tmp_path)
    assert re.search(rf"\(in {re.escape(__file__)}, line \d+\)", capsys.readouterr().err)


@pytest.mark.parametrize("folder", [None, "missing", "a file"])
def test_without_a_folder_the_file_is_elsewhere(
    folder: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "a file").touch()
    end(raised(KeyError("x")), "ddpm", folder and tmp_path / folder)
    path = Path(capsys.readouterr().err.rpartition("the full traceback is in ")[2].strip())
    assert path.parent == tmp_path and "KeyError: 'x'" in path.read_text()


def test_processes_do_not_mix_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        end(raised(KeyError(rank)), "ddpm", tmp_path)
    assert [(tmp_path / f"error-{rank}.txt").read_text().count(f"KeyError: '{rank}'") for rank in "01"] == [1, 1]


def test_the_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DDPM_TRACEBACK", "1")
    end(raised(InputError("no")), "ddpm")
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_the_run_of_a_command_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, words: list[str]) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(DiffusionCLI, "__init__", broken)
    config = tmp_path / "mine.yaml"
    config.write_text(f"run_dir: {tmp_path / 'run'}\n")
    (tmp_path / "run").mkdir()
    for words in (["fit", f"--run_dir={tmp_path / 'run'}"], ["fit", "-c", str(config)]):
        said = run_ddpm(*words, expect=1)
        assert said.startswith("ddpm: error: ZeroDivisionError: by zero (in ")
        assert said.endswith(f"the full traceback is in {tmp_path / 'run' / 'error.txt'}\n")
        os.remove(tmp_path / "run" / "error.txt")


def test_an_interruption_of_a_command_has_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: object, words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffusionCLI, "__init__", stopped)
    assert run_ddpm("fit", expect=130) == "ddpm: error: interrupted\n"


def test_a_script_ends_the_same_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("json.loads", lambda text: 1 / 0)
    cases = tmp_path / "cases.json"
    cases.write_text("[]")
    done = run_script("check_bound.py", "--cases", str(cases))
    assert done.returncode == 1 and done.stderr.startswith(
        "check_bound: error: ZeroDivisionError: division by zero (in "
    )
    assert done.stderr.count("\n") == 1
