"""Quality per minute of training beside other projects: the clock, the error, and a few steps of each project."""

import importlib.util
import json
import runpy
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, run_script

PEERS = {"diffusers": "diffusers", "denoising-diffusion-pytorch": "denoising_diffusion_pytorch"}
SHORT = ["--configs=configs/digits.yaml", "--minutes", "0.005", "0.01", "--n=10", "--steps=2", "--threads=1"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "bench_quality.py")))


def bench(out: Path, *options: str) -> dict[str, Any]:
    """What the script wrote."""
    done = run_script("bench_quality.py", *SHORT, f"--out={out}", *options)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads((out / "quality.json").read_text())
    lines = done.stdout.splitlines()
    assert len(lines) == 3 + len(record["projects"]) and lines[-1].startswith("floor: as many training images")
    assert all(name in line for name, line in zip(record["projects"], lines[2:], strict=False))
    assert (out / "quality.png").stat().st_size > 5_000
    return record


# --- the clock, the error, the frame


def test_the_clock_counts_training_alone(script: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 50 s; samples and their judgement, of 1,000 s, and a validation of 7 s are not counted."""
    now, rows = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    def judge(images: torch.Tensor) -> dict[str, float]:
        spend(1000)
        return {"frechet": float(images), "error": 0.0}

    marks = [1.0, 2.0, 5.0, 5.5, 10.0]
    training = script.Training("a", marks, torch.device("cpu"), "wall", judge, rows.append)
    training.go()
    ended = []
    for step in range(1, 13):
        spend(100 if step == 6 else 50)
        ended.append(training.after_step(16, lambda step=step: torch.tensor(step)))
        if step == 4:
            training.pause()
            spend(7)
            training.go()
    assert ended == [False] * 10 + [True] * 2
    assert [row["marks"] for row in rows] == [[1.0], [2.0], [5.0, 5.5], [10.0]]
    assert [row["frechet"] for row in rows] == [row["steps"] for row in rows] == [2, 3, 6, 11]
    assert [row["minutes"] for row in rows] == pytest.approx([100 / 60, 150 / 60, 350 / 60, 600 / 60])
    assert [row["images"] for row in rows] == [32, 48, 96, 176]


@pytest.mark.parametrize(("shift", "scale"), [(3.0, 2.0), (0.0, 3.0), (-2.0, 1.0)])
def test_the_error_is_that_of_the_delta_method(script: SimpleNamespace, shift: float, scale: float) -> None:
    r"""In one dimension $F = (m - \mu)^2 + (s - \sigma)^2$, and a normal sample's mean and standard deviation are
    independent with variances $s^2 / n$ and $s^2 / 2n$."""
    generator, n = torch.Generator().manual_seed(0), 1000
    real = torch.randn(1000, 1, generator=generator, dtype=torch.float64)
    points = shift + scale * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    found = script.Judge(real)(points)
    m, s, mean, std = (float(each) for each in (points.mean(), points.std(), real.mean(), real.std()))
    assert found["frechet"] == pytest.approx((m - mean) ** 2 + (s - std) ** 2, rel=1e-4)
    expected = 2 * s * (((m - mean) ** 2 + (s - std) ** 2 / 2) / n) ** 0.5
    # 200 resamples know a standard deviation to 5%, and 1,000 points the fourth moment to 7%
    assert found["error"] == pytest.approx(expected, rel=0.2)


def test_the_error_is_that_of_other_samples(script: SimpleNamespace) -> None:
    """In several dimensions, against samples that are drawn again."""
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    judge = script.Judge(real)
    others = [1 + 2 * torch.randn(300, 4, generator=generator, dtype=torch.float64) for _ in range(60)]
    spread = torch.tensor([judge.distance(points) for points in others]).std()
    errors = torch.tensor([judge(points)["error"] for points in others[:10]])
    assert float(errors.mean()) == pytest.approx(float(spread), rel=0.3)


def test_samples_that_are_all_the_same_have_no_error(script: SimpleNamespace) -> None:
    judge = script.Judge(torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]))
    found = judge(torch.tensor([[3.0, 4.0]]).expand(20, 2))
    # the real covariance is diag(2/3, 8/3), and that of one point is 0
    assert found == {"frechet": pytest.approx(25 + 10 / 3), "error": 0}


@pytest.mark.parametrize(
    ("size", "multiple", "sides"), [((28, 28), 32, [32, 32]), ((7, 5), 4, [8, 8]), ((8, 8), 4, [8, 8])]
)
def test_a_frame_is_taken_off_again(
    script: SimpleNamespace, size: tuple[int, int], multiple: int, sides: list[int]
) -> None:
    images = torch.randint(1, 17, (3, 2, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = script.Pictures(images, 17)
    framed = pictures.framed(multiple)
    assert [*framed.shape[2:]] == sides and int((framed > 0).sum()) == images.numel()
    assert torch.equal(pictures.levels_of(iter((framed / 16).split(2))), images)


# --- the projects


@pytest.mark.parametrize("name", ["digits", "diffusers-small-as-ours", "denoising-diffusion-pytorch-small"])
def test_a_project_trains_for_a_few_steps(name: str, tmp_path: Path) -> None:
    if name != "digits":
        pytest.importorskip(PEERS[name.split("-small")[0]], reason="pip install 'ddpm-lightning[bench]'")
    record = bench(tmp_path, "--only", name)
    assert record["facts"]["data"] == "digits" and record["facts"]["n"] == 10 and record["floor"]["frechet"] > 0
    project = record["projects"][f"{name}, seed 0"]
    rows = project["rows"]
    assert [mark for row in rows for mark in row["marks"]] == [0.005, 0.01]
    assert all(
        row["minutes"] >= max(row["marks"]) and row["images"] == row["steps"] * project["batch_size"] for row in rows
    )
    assert all(row["frechet"] > 0 and row["error"] > 0 for row in rows) and rows[0]["steps"] > 0
    expected = {"digits": (128, 1e-3), "diffusers-small-as-ours": (64, 2e-3)}.get(name, (16, 1e-4))
    assert (project["batch_size"], project["learning_rate"]) == expected
    assert project["parameters"] > 5e5 and project["gflops"] > 0
    assert (tmp_path / f"samples-{name}-0.png").stat().st_size > 500


def test_what_is_finished_is_not_repeated_and_the_rest_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several projects are trained in processes of their own; here each is run in this one."""
    other = tmp_path / "other.yaml"
    other.write_text(f"extends: {ROOT}/configs/digits.yaml\nmodel: {{ema_decay: 0.9}}\n")
    started = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(words[-1])
        return run_script("bench_quality.py", *words[2:])

    first = bench(tmp_path, "--only", "digits")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        both = ["--configs", f"{ROOT}/configs/digits.yaml", str(other), "--only", "digits", "other"]
        second = bench(tmp_path, "--seed=1", *both)
    assert started == ["digits", "other"]
    assert list(second["projects"]) == ["digits, seed 0", "digits, seed 1", "other, seed 1"]
    assert second["projects"]["digits, seed 0"] == first["projects"]["digits, seed 0"]
    third = bench(tmp_path, "--only", "digits")
    assert third == second
    more = bench(tmp_path, "--only", "digits", "--minutes", "0.01", "0.02")
    assert [mark for row in more["projects"]["digits, seed 0"]["rows"] for mark in row["marks"]] == [0.01, 0.02]
    refused = run_script("bench_quality.py", *SHORT, f"--out={tmp_path}", "--n=11", "--only=digits")
    assert refused.returncode == 2 and "holds rows of n 10: give another folder" in refused.stderr


@pytest.mark.parametrize("name", ["diffusers-small", "denoising-diffusion-pytorch"])
def test_a_project_that_is_not_installed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda each, *more: None if each in PEERS.values() else there(each, *more)
    )
    done = run_script("bench_quality.py", *SHORT, f"--out={tmp_path}", "--only", name)
    module = PEERS[name.removesuffix("-small")]
    sentence = f"{name} needs {module}, which is not installed: pip install 'ddpm-lightning[bench]'"
    assert done.returncode == 2 and done.stderr == f"bench_quality: error: {sentence}\n"
    left_out = run_script("bench_quality.py", *SHORT, f"--out={tmp_path}", "--minutes=0.001")
    assert left_out.returncode == 0 and f"left out: {sentence}\n" in left_out.stderr
    assert list(json.loads((tmp_path / "quality.json").read_text())["projects"]) == ["digits, seed 0"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--only=GAN"], "--only GAN: there are digits, diffusers-small"),
        (["--minutes", "0", "1"], "--minutes 0 must be above 0"),
        (["--steps=1000"], "--steps 1000 at most 999"),
        (["--n=9"], "--n 9 must be 10 or more"),
        (["--threads=0"], "--threads 0 must be 1 or more"),
        (["--device=tpu"], "--device tpu cannot be read as cpu or cuda"),
        (["--device=cuda", "--clock=cpu"], "--device cuda needs a GPU, and --clock wall"),
    ],
)
def test_bad_options_get_one_line(option: list[str], words: str, tmp_path: Path) -> None:
    done = run_script("bench_quality.py", *SHORT, f"--out={tmp_path / 'out'}", *option)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
