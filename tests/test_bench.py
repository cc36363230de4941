"""The benchmarks run, and write what they measured. No number is judged: the machine may be busy."""

import json
import math
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from ddpm_lightning.command_line import call
from ddpm_lightning.errors import InputError

SHORT = ["--rounds=1", "--steps=1", "--warm_up=1", "--batch_size", "2"]
Script = Callable[[str], dict[str, Any]]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """The names in a script, read here, where torch is loaded already."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return lambda name: runpy.run_path(str(ROOT / "scripts" / name))


@pytest.fixture
def run(script: Script, tmp_path: Path) -> Run:
    """Run a benchmark; what it wrote."""

    def start(name: str, *arguments: str) -> dict[str, Any]:
        assert call(script(name)["main"], [*arguments, f"--json={tmp_path}/a.json"], name) == 0
        record: dict[str, Any] = json.loads((tmp_path / "a.json").read_text())
        assert record["machine"]["threads"] == 1 and record["peak_memory_mib"] > 100
        assert all(map(is_sound, record["groups"]))
        return record

    return start


def is_sound(group: dict[str, Any]) -> bool:
    """The rates and ratios of a group are positive and finite, and fit the times."""
    for row in group["rows"].values():
        rate, low, high = (row[f"images_per_second{end}"] for end in ("", "_low", "_high"))
        assert 0 < low <= high and rate * row["ms_per_step"] == pytest.approx(1e3 * group["batch_size"])
        if group["flops_per_step"]:
            assert row["gflops_per_second"] * row["ms_per_step"] == pytest.approx(group["flops_per_step"] / 1e6)
    for found in group["ratios"].values():
        assert 0 < found["low"] <= found["ratio"] <= found["high"] and all(map(math.isfinite, found.values()))
    return bool(group["rows"])


def test_bench_train_reports_rates_ratios_and_overhead(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--width=8", "--only", "lecture", "unet", "overhead", "--overhead_steps=20"]
    groups = run("bench_train.py", *SHORT, *only)["groups"]
    names = [("lecture", 2), ("unet", 2), ("overhead", 8)]
    assert [(group["group"], group["batch_size"]) for group in groups] == names
    lecture, unet = groups[:2]
    without, defaults = "bf16 without channels_last", "package float32 defaults"
    against = ["package step", "package step + average", "package Trainer", defaults, "package bf16 defaults"]
    assert list(lecture["rows"]) == ["lecture", *against[:4], without, against[4]]
    assert set(lecture["ratios"]) == {f"{name} / lecture" for name in against} | {
        f"package bf16 defaults / {name}" for name in (without, defaults)
    }
    assert "U-Net bf16 channels_last / U-Net bf16" in unet["ratios"]
    # the convolutions of the lecture's network, forward (2 FLOP a multiplication) and backward, by hand
    weights = 9 * (64 + 64 * 128 + 128 * 64 + 64)
    linear = 2 * (64 + 64 * 128)
    by_hand = 2 * 2 * 28 * 28 * (3 * weights - 9 * 64) + 2 * (3 * linear - 2 * 64)
    assert lecture["flops_per_step"] == pytest.approx(by_hand, rel=1e-3)
    # each share is of the peak of the row's own precision
    peaks = lecture["peak_flops_per_second"]
    for name, row in lecture["rows"].items():
        peak = peaks["bf16" if "bf16" in name else "32"]
        assert row["share_of_peak"] * peak == pytest.approx(1e9 * row["gflops_per_second"])
    assert list(groups[-1]["ratios"]) == ["bare step + average / bare step", "Trainer / bare step"]
    assert "Trainer / bare step" in capsys.readouterr().out


def test_a_turn_of_the_trainer_may_be_longer_than_an_epoch(script: Script) -> None:
    """4,096 images are two batches."""
    names = script("bench_train.py")
    contest = names["Contest"](names["TwoWeights"](), 2048, torch.device("cpu"))
    assert contest.trainer(partial(torch.optim.Adam, lr=1e-4)).go(3).wall > 0


def test_bench_train_against_diffusers_or_without(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    groups = run("bench_train.py", *SHORT, "--width=8", "--only", "diffusers")["groups"]
    if not groups:
        assert "diffusers is left out" in capsys.readouterr().err
    for group in groups:
        rows = ["diffusers", "package step on UNet2DModel", "package Trainer on UNet2DModel"]
        rows += ["float32 defaults", "bf16 defaults"]
        assert list(group["rows"]) == rows and len(group["ratios"]) == 4


def test_bench_bound_reports_rates_and_memory(run: Run) -> None:
    options = ["--width=8", "--forms", "denoising", "trajectory", "--timed_T=3", "--T", "6", "3", "--precision=bf16"]
    record = run("bench_bound.py", *SHORT, "3", *options)
    assert [group["batch_size"] for group in record["groups"]] == [6, 9]
    for group in record["groups"]:
        assert list(group["rows"]) == ["training forward", "forward", "denoising bound", "trajectory bound"]
        assert len(group["ratios"]) == 4
    assert list(record["memory_mib"]) == ["2", "3"]
    for forms in record["memory_mib"].values():
        assert {form: list(sizes) for form, sizes in forms.items()} == {
            "denoising": ["3", "6"],
            "trajectory": ["3", "6"],
        }
    with pytest.raises(InputError, match="--T 1 must be 2 or more"):
        run("bench_bound.py", "--T", "1")


def test_bench_sample_compares_all(run: Run) -> None:
    pytest.importorskip("diffusers", reason="pip install 'ddpm-lightning[export]'")
    options = ["--ddim_steps=2", "--ancestral_steps=2", "--tiny"]
    groups = run("bench_sample.py", *SHORT, "3", "--rounds=2", *options)["groups"]
    assert [list(group["rows"]) for group in groups] == 2 * [
        ["diffusers", "package"],
        ["diffusers", "plain loop", "package"],
    ]
    with pytest.raises(InputError, match="--ddim_steps 3 must divide 1000"):
        run("bench_sample.py", "--ddim_steps=3")
