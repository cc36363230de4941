"""``ddpm new``: the project that it writes passes its own test, trains and draws; what cannot be one is refused."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from builders import refused
from conftest import ROOT, run_ddpm

from ddpm_lightning import projects
from ddpm_lightning.configuration import read
from ddpm_lightning.errors import InputError
from ddpm_lightning.projects import new


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    # here a process goes on with another folder, which a user's does not
    sys.path_importer_cache.pop(str(tmp_path), None)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "my_project"]:
        del sys.modules[name]


@pytest.mark.cli
def test_a_project_passes_its_own_test_trains_and_draws(folder: Path) -> None:
    printed = run_ddpm("new", "my_project", "--channels", "3", cwd=folder)
    project = folder / "my_project"
    assert [line for line in printed.splitlines() if line.startswith("  ")] == [
        "  cd my_project",
        "  python -m pytest",
        "  ddpm fit -c configs/default.yaml",
        "  ddpm sample runs/default --n 16",
    ]
    text = "".join(path.read_text() for path in project.rglob("*") if path.suffix not in ("", ".npz"))
    assert "$" not in text and "ddpm-lightning>=" in text
    style = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=E,F,W,I,UP,B", "--line-length=120", "."]
    linted = subprocess.run(style, cwd=project, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout and "warning" not in done.stdout, done.stdout[-4000:]
    short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=0")
    assert "(512 training images)" in run_ddpm("fit", "-c", "configs/default.yaml", *short, cwd=project)
    run_ddpm("sample", "runs/default", "--n", "2", "--steps", "2", cwd=project)
    assert (project / "runs/default/samples.png").is_file()
    # and once more, nothing is overwritten
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    assert "my_project is there already, and is not empty" in run_ddpm("new", "my_project", cwd=folder, expect=2)
    assert before == {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}


def test_the_pictures_are_what_the_class_says(folder: Path) -> None:
    (folder / "swirls").mkdir()  # an empty folder is filled
    new("swirls", channels=2, size=5)
    new("further/down/swirls_2")
    assert "shape = (2, 5, 5)" in (folder / "swirls/swirls/data.py").read_text()
    with np.load(folder / "swirls/pictures.npz") as file:
        images, labels = file["images"].astype(float), file["labels"]
    assert images.shape == (640, 2, 5, 5) and np.bincount(labels).tolist() == [320, 320]
    down, across = images.mean(3).std(2).mean(1), images.mean(2).std(2).mean(1)
    assert ((across > down) == (labels == 1)).all()
    config = read(folder / "further/down/swirls_2/configs/default.yaml")
    assert (
        config["trainer"]["callbacks"]
        == yaml.safe_load((ROOT / "configs/base.yaml").read_text())["trainer"]["callbacks"]
    )
    assert config["data"]["class_path"] == "swirls_2.data.Pictures"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my-project", "cannot name a package: take letters, digits and _, such as my_project"),
        ("1x", "take letters, digits and _, such as x"),
        ("_x", "such as x"),
        ("", "'' cannot name a package"),
        ("..", ".. cannot name a package"),
        ("été", "été cannot name a package"),
        ("class", "class is a word of Python"),
        ("Tests", "Tests is the name of a folder in each project"),
        ("random", "random is the name of an installed package"),
        ("torch", "torch is the name of an installed package"),
        ("scikit_learn", "scikit_learn is the name of an installed package"),
        ("ddpm_lightning", "ddpm_lightning is the name of an installed package"),
        ("x" * 300, "File name too long"),
        ("file", "file is there already, and is no folder"),
        ("link", "link is there already, and is no folder"),
        ("file/swirls", "file/swirls cannot be made: file is no folder"),
        ("full", "full is there already, and is not empty"),
        ("/proc/swirls", "/proc/swirls cannot be made: "),
    ],
)
def test_what_cannot_be_a_project_is_refused(folder: Path, name: str, words: str) -> None:
    (folder / "file").write_text("swirls")
    (folder / "link").symlink_to("nowhere")
    (folder / "full").mkdir()
    (folder / "full/file").write_text("swirls")
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError) as refusal:
        new(name)
    assert words in str(refusal.value)
    assert sorted(folder.rglob("*")) == before


def test_half_a_project_is_never_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(projects.np, "savez_compressed", full)
    with pytest.raises(InputError, match="swirls cannot be made: No space left on device"):
        new("swirls")
    assert [*folder.iterdir()] == []


@pytest.mark.cli
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: PROJECT"),
        (["swirls", "--channels", "0"], "--channels 0 must lie between 1 and 16"),
        (["swirls", "--size", "1000000"], "--size 1000000 must lie between 4 and 128"),
        (["swirls", "more"], "unrecognized arguments: more"),
        (["--pretrained", "mnist"], "new --pretrained: a project begins without a model"),
    ],
)
def test_options_of_new(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in refused(capsys, "new", *words)
    assert [*folder.iterdir()] == []
