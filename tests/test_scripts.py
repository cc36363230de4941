"""The scripts that read a run."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_ddpm, run_script

from ddpm_lightning.process import AnalyticVariance, LearnedRangeVariance, ReverseVariance
from ddpm_lightning.runs import load_run

pytestmark = pytest.mark.cli


def test_compare_estimators_reports_every_form_and_T(trained: Path, tmp_path: Path) -> None:
    options = [f"--config={trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", f"--out={tmp_path}"]
    done = run_script("compare_estimators.py", *options, "--T", "4", "40", "--images=24", "--draws=4")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "estimators.json").read_text())
    assert [(row["T"], row["form"]) for row in rows] == [
        (T, form) for T in (4, 40) for form in ("denoising", "consistency", "trajectory")
    ]
    by_key = {(row["T"], row["form"]): row for row in rows}
    for T in (4, 40):
        denoising, consistency = by_key[T, "denoising"], by_key[T, "consistency"]
        error = 4 * (denoising["elbo_se"] + consistency["elbo_se"])
        assert abs(denoising["elbo_nats"] - consistency["elbo_nats"]) < error
        assert consistency["noise_separate_steps"] > 2 * denoising["noise_separate_steps"]
    # with steps drawn apart the noise of the form of more variables grows with T, along one path it does not
    small, large = by_key[4, "consistency"], by_key[40, "consistency"]
    assert large["noise_separate_steps"] > 2 * small["noise_separate_steps"]
    assert large["noise_one_path"] < 2 * small["noise_one_path"]
    assert (tmp_path / "estimators.png").stat().st_size > 10_000
    assert "variance ratio" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--draws=1"], "--draws"),
        (["--config=README.md"], "--config README.md"),
        (["--T", "0"], "T = 0"),
    ],
)
def test_compare_estimators_refuses_bad_input(trained: Path, arguments: list[str], word: str) -> None:
    options = [f"--config={trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", "--images=2"]
    done = run_script("compare_estimators.py", *options, *arguments)
    assert done.returncode == 2 and word in done.stderr


def test_analytic_variance_is_measured_and_raises_the_bound(trained: Path, tmp_path: Path) -> None:
    """The script's file laid over the run's own configuration, through the real entry point."""
    config, checkpoint, overlay = trained / "config.yaml", trained / "checkpoints/last.ckpt", tmp_path / "analytic.yaml"
    options = [f"--config={config}", f"--ckpt_path={checkpoint}", "--images=300", f"--out={overlay}"]
    done = run_script("analytic_variance.py", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "300 of 300 images"
    part = yaml.safe_load(overlay.read_text())["model"]["variance"]
    assert part["class_path"] == "ddpm_lightning.process.AnalyticVariance"
    variance = AnalyticVariance(**part["init_args"])
    module, data = load_run(config, checkpoint)
    model = module.ema_model
    # a chain of 12 steps has a place in the table for nearly each of them, and for both ends
    ends = model.schedule.gamma(model.grid[[1, 12]]).tolist()
    assert [variance.gammas[0], variance.gammas[-1]] == ends and len(variance.gammas) >= 8

    bounds = ["--model.test_bounds=[{class_path: DenoisingElbo}]", f"--run_dir={tmp_path}"]
    run_ddpm("test", f"-c={config}", f"-c={overlay}", f"--ckpt_path={checkpoint}", *bounds)
    assert "AnalyticVariance" in (tmp_path / "bound-test.txt").read_text()
    figures = json.loads((tmp_path / "bound-test.json").read_text())["figures"]["denoising"]

    def cost(other: ReverseVariance) -> float:
        model.reverse_process.variance = other
        with torch.no_grad():
            batch = next(iter(data.test_dataloader()))
            return float(module.bound(module.bounds["test"][0], batch)["denoising_matching"].mean())

    fixed = cost(model.reverse_process.variance)
    assert figures["denoising_matching"]["mean"] == pytest.approx(cost(variance), rel=1e-5)
    assert figures["denoising_matching"]["mean"] < fixed


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--images=0"], "--images"),
        (["--points=1"], "points = 1"),
        ([], "LearnedRangeVariance, which its network gives"),
    ],
)
def test_analytic_variance_refuses_bad_input(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    word: str,
) -> None:
    script = runpy.run_path(str(ROOT / "scripts/analytic_variance.py"))
    if not arguments:
        module, data = load_run(trained / "config.yaml", trained / "checkpoints/last.ckpt")
        module.ema_model.reverse_process.variance = LearnedRangeVariance()
        script["main"].__globals__["load_run"] = lambda *_: (module, data)
    options = [f"--config={trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", f"--out={tmp_path}/a"]
    monkeypatch.setattr(sys, "argv", ["analytic_variance.py", *options, *arguments])
    try:
        status = script["main"]()
    except SystemExit as stop:  # argparse's own errors
        status = stop.code
    assert status == 2 and word in capsys.readouterr().err and not (tmp_path / "a").exists()


# --- compare_choices


def test_compare_choices_trains_once_and_reports_every_variance(tmp_path: Path) -> None:
    options = ["--steps=2", "--few=3", "--many=2", "--images=8", f"--out={tmp_path}"]
    done = run_script("compare_choices.py", *options, "--only=gamma, bound")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "choices.json").read_text())
    variances = ["beta", "beta-tilde", "analytic"]
    assert [(row["schedule"], row["variance"]) for row in rows] == [
        *(("linear gamma", name) for name in variances),
        *(("learned gamma", name) for name in variances),
    ]
    assert all(0 < row[column][1] < row[column][0] for row in rows for column in ("few", "many", "continuous"))
    # the analytic variance is measured for the same denoiser, and a few steps are where it matters
    for schedule in ("linear gamma", "learned gamma"):
        few = {row["variance"]: row["few"][0] for row in rows if row["schedule"] == schedule}
        assert few["analytic"] < min(few["beta"], few["beta-tilde"])
    stamp = (tmp_path / "linear_gamma-bound" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = run_script("compare_choices.py", *options, "--only=linear gamma, bound")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "linear_gamma-bound" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == stamp


def test_compare_choices_refuses_bad_input() -> None:
    for option, word in (("--few=1", "--few 2 or more"), ("--only=quadratic", "--only quadratic: none of")):
        done = run_script("compare_choices.py", option)
        assert done.returncode == 2 and word in done.stderr


def test_flow_likelihood_is_a_figure_for_the_data(trained: Path, tmp_path: Path) -> None:
    run = [f"--config={trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", f"--out={tmp_path}"]
    figures = {}
    for dequantization in ("decoder", "uniform"):
        options = [f"--dequantization={dequantization}", "--images=12", "--batch_size=5", "--steps=8", "--check"]
        done = run_script("flow_likelihood.py", *run, *options)
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "flow.json").read_text())
        assert [row["evaluations"] for row in record["figures"]] == [32, 64] and record["images"] == 12
        figures[dequantization] = record["figures"][1]["bits_per_dim"]
        assert "16 steps, 64 evaluations" in done.stdout and "twice the steps" in done.stdout
    # 20 steps of training: around the 4.09 bits of a uniform distribution over 17 levels
    assert all(1 < bits < 6 for bits in figures.values()), figures
    done = run_script("flow_likelihood.py", *run, "--steps=0")
    assert done.returncode == 2 and "steps = 0 must be 1 or more" in done.stderr
