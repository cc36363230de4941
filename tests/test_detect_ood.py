"""The out-of-distribution example."""

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, run_script

from ddpm_lightning.data import Batch
from ddpm_lightning.runs import load_run

pytestmark = pytest.mark.cli


@pytest.fixture(scope="module")
def ood() -> ModuleType:
    spec = importlib.util.spec_from_file_location("detect_ood", ROOT / "scripts/detect_ood.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_detect_ood_judges_every_set(trained: Path, tmp_path: Path) -> None:
    run = [f"--config={trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", f"--out={tmp_path}"]
    done = run_script("detect_ood.py", *run, "--images=60", "--batch_size=40")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "ood.json").read_text())
    assert (record["T"], record["steps"], record["weights"], record["steps_trained"]) == (12, 11, "averaged", 20)
    sets = {row["set"]: row for row in record["sets"]}
    altered = ["rotated by 90 degrees", "inverted", "pixels shuffled", "uniform noise"]
    # the embedded digits are the data themselves here
    assert list(sets) == ["validation images", "test images", *altered]
    assert all(row["images"] == 60 and row["bits_per_dim"]["se"] > 0 for row in sets.values())
    assert "likelihood" not in sets["test images"]
    # even twenty steps of training tell noise from digits
    assert sets["uniform noise"]["likelihood"]["auroc"] > 0.95
    assert sets["pixels shuffled"]["likelihood"]["auroc"] > 0.5 + 4 * sets["pixels shuffled"]["likelihood"]["se"]
    rows = list(csv.DictReader((tmp_path / "ood.csv").open()))
    assert len({row["index"] for row in rows}) == 60
    mean = sum(float(row["inverted"]) for row in rows) / 60
    assert mean == pytest.approx(sets["inverted"]["bits_per_dim"]["mean"], rel=1e-12)
    assert (tmp_path / "ood.png").stat().st_size > 10_000
    assert "uniform noise: 60 of 60 images" in done.stderr and "AUROC typicality" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt does not exist"), (["--images=1"], "--images"), (["--T=0"], "T = 0")],
)
def test_detect_ood_refuses_bad_input(
    ood: ModuleType,
    trained: Path,
    arguments: list[str],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = [f"--config={trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", "--images=2"]
    monkeypatch.setattr(sys, "argv", ["detect_ood.py", *run, *arguments])
    try:
        status = ood.main()
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    assert status == 2 and word in captured.err and captured.out == ""


def test_auroc_of_any_scores(ood: ModuleType) -> None:
    """Pairs counted one by one, with ties, and with scores so large that a sigmoid of them would be 1."""
    inside, outside = torch.tensor([1.0, 2.0, 2.0, 90.0, 95.0]).double(), torch.tensor([2.0, 80.0, 91.0, 92.0]).double()
    wins = [1.0 if o > i else 0.5 if o == i else 0.0 for o in outside for i in inside]
    assert ood.auroc(inside, outside) == pytest.approx(sum(wins) / len(wins), abs=1e-6)
    assert ood.auroc(-inside, -outside) == pytest.approx(1 - sum(wins) / len(wins), abs=1e-6)


def test_standard_error_of_auroc_knows_the_pairs(ood: ModuleType) -> None:
    """For independent scores it is about that of Hanley and McNeil (1982); for tied pairs it is much smaller."""
    generator = torch.Generator().manual_seed(0)
    inside, other = torch.randn(2, 400, generator=generator, dtype=torch.float64)
    area = ood.auroc(inside, other + 1)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    expected = ((area * (1 - area) + 399 * (q1 + q2 - 2 * area**2)) / 400**2) ** 0.5
    assert ood.auroc_se(inside, other + 1) == pytest.approx(expected, rel=0.15)
    assert ood.auroc_se(inside, inside + 1) < 0.5 * expected


def test_sets_are_what_they_say(ood: ModuleType, trained: Path) -> None:
    module, data = load_run(trained / "config.yaml", trained / "checkpoints/last.ckpt")
    inside = data.split("test").chosen(20, seed=3)
    sets = ood.outliers(module, inside, False, seed=3)
    for name, batch in sets.items():
        assert batch.image.dtype == torch.uint8 and batch.image.shape == inside.image.shape, name
        assert torch.equal(batch.index, inside.index), name
        assert not torch.equal(batch.image, inside.image), name
        assert int(batch.image.min()) >= 0 and int(batch.image.max()) == 16, name
    assert torch.equal(sets["inverted"].image, 16 - inside.image)
    # the first row, read from the left, becomes the first column, read from below
    assert torch.equal(sets["rotated by 90 degrees"].image[..., 0], inside.image[:, :, 0].flip(-1))
    shuffled = sets["pixels shuffled"].image.flatten(1)
    assert torch.equal(shuffled.sort(1)[0], inside.image.flatten(1).sort(1)[0])
    part = ood.outliers(module, Batch(*(column[5:7] for column in inside)), True, seed=3)
    for name, batch in part.items():
        assert torch.equal(batch.image, sets[name].image[5:7]), name
    assert "embedded digits" in sets and "embedded digits" not in part
    # at their own size the digits come back as they are
    digits, labels = ood.enlarged_digits(module, 20)
    assert torch.equal(digits, data.split("test").images[:20]) and torch.equal(labels, data.split("test").labels[:20])
