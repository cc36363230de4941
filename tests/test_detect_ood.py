"""``ddpm evaluate ood``."""

import csv
import json
from pathlib import Path

import pytest
import torch

from ddpm_lightning.cli import main
from ddpm_lightning.evaluation import ood
from ddpm_lightning.runs import Run

pytestmark = pytest.mark.cli


def test_every_set_is_judged(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_lightning.progress.QUIET", 0)
    main(["evaluate", "ood", str(trained), "--images=60", "--batch_size=40", f"--out={tmp_path}"])
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
    captured = capsys.readouterr()
    assert "uniform noise: 100%" in captured.err and "60/60" in captured.err and "AUROC typicality" in captured.out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--checkpoint=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--images=1"], "--images"),
        (["--T=0"], "--T 0"),
    ],
)
def test_bad_input_is_refused(
    trained: Path, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "ood", str(trained), "--images=2", *arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and word in captured.err and captured.out == ""


def test_auroc_of_any_scores() -> None:
    """Pairs counted one by one, with ties, and with scores so large that a sigmoid of them would be 1."""
    inside, outside = torch.tensor([1.0, 2.0, 2.0, 90.0, 95.0]).double(), torch.tensor([2.0, 80.0, 91.0, 92.0]).double()
    wins = [1.0 if o > i else 0.5 if o == i else 0.0 for o in outside for i in inside]
    assert ood.auroc(inside, outside) == pytest.approx(sum(wins) / len(wins), abs=1e-6)
    assert ood.auroc(-inside, -outside) == pytest.approx(1 - sum(wins) / len(wins), abs=1e-6)


def test_standard_error_of_auroc_knows_the_pairs() -> None:
    """For independent scores it is about that of Hanley and McNeil (1982); for tied pairs it is much smaller."""
    generator = torch.Generator().manual_seed(0)
    inside, other = torch.randn(2, 400, generator=generator, dtype=torch.float64)
    area = ood.auroc(inside, other + 1)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    expected = ((area * (1 - area) + 399 * (q1 + q2 - 2 * area**2)) / 400**2) ** 0.5
    assert ood.auroc_se(inside, other + 1) == pytest.approx(expected, rel=0.15)
    assert ood.auroc_se(inside, inside + 1) < 0.5 * expected


def test_sets_are_what_they_say(trained: Path) -> None:
    module, data = Run(trained).load()
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
    part = ood.outliers(module, inside.map(lambda column: column[5:7]), True, seed=3)
    for name, batch in part.items():
        assert torch.equal(batch.image, sets[name].image[5:7]), name
    assert "embedded digits" in sets and "embedded digits" not in part
    # at their own size the digits come back as they are
    digits, labels = ood.enlarged_digits(module, 20)
    assert torch.equal(digits, data.split("test").images[:20]) and torch.equal(labels, data.split("test").labels[:20])
