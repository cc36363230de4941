"""A run's folder: one place for all that belongs to it, however it is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from builders import OLD_RUN, refused
from conftest import run_ddpm
from PIL import Image

from ddpm_lightning.errors import InputError
from ddpm_lightning.runs import Run
from ddpm_lightning.runs.lock import hold


@pytest.fixture
def old_run(tmp_path: Path) -> Run:
    return Run(shutil.copytree(OLD_RUN, tmp_path / "run"))


def test_a_folder_is_absolute_and_its_home_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Run("~/a").folder == Run("a").folder == Run(tmp_path / "a").folder == tmp_path / "a"


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is no folder"):
        Run(name)


def test_load_gives_the_trained_module_and_its_data(old_run: Run) -> None:
    module, data = old_run.load()
    assert not module.training and module.steps_trained == 20
    assert module.shape == data.shape == (1, 8, 8)
    assert old_run.load_module("best").steps_trained == 20
    assert Run(str(old_run.folder)).load_module(str(old_run.checkpoints / "best.ckpt")).steps_trained == 20


def test_what_is_not_there_is_refused_with_what_there_is(old_run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nix holds no run"):
        _ = Run(tmp_path / "nix").config
    with pytest.raises(InputError, match=r"best2\.ckpt does not exist; this run has .*best\.ckpt, .*last\.ckpt"):
        old_run.checkpoint(old_run.checkpoints / "best2.ckpt")
    for text in ("- 1", "a: [", "model: {}"):
        old_run.config_path.write_text(text)
        with pytest.raises(InputError, match=r"config\.yaml"):
            _ = Run(old_run.folder).config


def test_the_newest_checkpoint_stands_in_for_a_missing_last_one(old_run: Run) -> None:
    last, best = old_run.checkpoints / "last.ckpt", old_run.checkpoints / "best.ckpt"
    assert old_run.newest_checkpoint() == last
    last.rename(old_run.checkpoints / "previous.ckpt")
    assert old_run.newest_checkpoint() == old_run.checkpoint("last") == last  # its readers take the one before
    (old_run.checkpoints / "previous.ckpt").unlink()
    assert old_run.newest_checkpoint() == best
    best.unlink()
    assert old_run.newest_checkpoint() is None


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert json.loads(run.write("a.json", {"x": [1, 2]}).read_text()) == {"x": [1, 2]}
    assert run.write("deep/b.txt", "text").read_text() == "text"
    picture = torch.arange(3 * 2 * 4, dtype=torch.uint8).reshape(3, 2, 4)
    assert Image.open(run.write("c.png", picture)).size == (4, 2)
    with pytest.raises(TypeError):
        run.write("a.json", {"x": object()})
    assert json.loads((run.folder / "a.json").read_text()) == {"x": [1, 2]}


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_a_lock_that_is_no_file_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    path, target = tmp_path / ".lock", tmp_path / "target"
    target.write_text("precious")
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(target)}[kind]()
    with pytest.raises(InputError, match="remove it"), hold(path, "is used"):
        pass
    assert target.read_text() == "precious"


# ---------------------------------------------------------------- the command line


def test_a_run_of_version_0_1_goes_on(old_run: Run) -> None:
    """Its class paths are those of then, and its checkpoint names the folder that it was trained in."""
    output = run_ddpm("fit", str(old_run.folder), "--trainer.max_epochs=3")
    assert "step 30" in output and str(old_run.folder) in output
    checkpoint = torch.load(old_run.checkpoints / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 30
    assert old_run.config["trainer"]["max_epochs"] == 3
    assert not [name for name in old_run.folder.iterdir() if name.name == "runs"]


def test_commands_take_a_run(old_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_ddpm("test", "run", "--ckpt_path=best", cwd=tmp_path)
    assert json.loads((old_run.folder / "bound-test.json").read_text())["steps_trained"] == 20
    run_ddpm("sample", "run", "--n=2", cwd=tmp_path)
    assert (old_run.folder / "samples.png").is_file()


def test_the_configuration_of_a_copy_means_the_copy(old_run: Run, tmp_path: Path) -> None:
    run_ddpm("fit", str(old_run.folder), "--trainer.max_epochs=3")  # its configuration now holds its absolute path
    copy = Run(shutil.copytree(old_run.folder, tmp_path / "copy"))
    run_ddpm("test", "-c", str(copy.config_path), "--ckpt_path=last")
    assert (copy.folder / "bound-test.txt").is_file()
    assert not (old_run.folder / "bound-test.txt").exists()


def test_home_in_a_configuration_is_one_folder(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("run_dir: ~/here\n")
    run_ddpm("fit", *tiny, "-c", str(tmp_path / "mine.yaml"), "--trainer.max_steps=10")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "here"}
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names >= {"config.yaml", "checkpoints", "forward.png", "samples"}
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert yaml.safe_load((tmp_path / "here/config.yaml").read_text())["run_dir"] == str(tmp_path / "here")


def test_another_logger_leaves_the_run_in_its_folder(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, logs = Run(tmp_path / "run"), tmp_path / "logs"
    logger = f"--trainer.logger={{class_path: CSVLogger, init_args: {{save_dir: {logs}}}}}"
    run_ddpm("fit", *tiny, f"--run_dir={run.folder}", "--trainer.max_epochs=1", logger)
    assert {path.name for path in run.checkpoints.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert run.config["trainer"]["max_epochs"] == 1 and len(list(logs.rglob("metrics.csv"))) == 1
    assert "already holds a run" in refused(capsys, "fit", *tiny, f"--run_dir={run.folder}", logger)
    assert "step 20" in run_ddpm("fit", str(run.folder), "--trainer.max_epochs=2")
    run_ddpm("test", str(run.folder))
    assert (run.folder / "bound-test.txt").is_file()


def test_a_run_without_last_checkpoint_goes_on_from_the_newest(old_run: Run) -> None:
    (old_run.checkpoints / "last.ckpt").unlink()
    output = run_ddpm("fit", str(old_run.folder), "--trainer.max_epochs=3")
    assert "training goes on from best.ckpt" in output and "step 30" in output


def test_no_folder_is_refused(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--run_dir runs/mnist" in refused(capsys, "fit", *tiny, "--run_dir=")
    assert "holds no run" in refused(capsys, "test", "runs/there_is_no_such_run")
