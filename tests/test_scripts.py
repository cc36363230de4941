"""The scripts that read a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.cli


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/compare_estimators.py"), *arguments]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_compare_estimators_reports_every_form_and_T(trained: Path, tmp_path: Path) -> None:
    run = [f"--config={trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", f"--out={tmp_path}"]
    done = compare(*run, "--T", "4", "40", "--images=24", "--draws=4")
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
    run = [f"--config={trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", "--images=2"]
    done = compare(*run, *arguments)
    assert done.returncode == 2 and word in done.stderr
