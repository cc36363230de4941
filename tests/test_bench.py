"""The benchmarks run, and write what they measured. No figure is judged: the machine may be busy."""

import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from ddpm_lightning.command_line import call
from ddpm_lightning.errors import InputError

SHORT = ["--batch_size", "2", "3", "--rounds=2", "--steps=1", "--warm_up=1", "--width=8"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a script here, where torch is loaded already."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def start(name: str, *arguments: str) -> int:
        return call(runpy.run_path(str(ROOT / "scripts" / name))["main"], [*arguments], name)

    return start


def finite(value: Any) -> bool:
    """All numbers in it are positive and finite."""
    if isinstance(value, dict):
        return all(finite(item) for item in value.values())
    return value is None or (math.isfinite(value) and value > 0)


def test_bench_train_reports_rates_ratios_and_overhead(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    only = ["--only", "lecture", "unet", "overhead", "--overhead_steps=20"]
    assert run("bench_train.py", *SHORT, *only, f"--json={tmp_path}/a.json") == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["machine"]["threads"] == 1 and record["peak_memory_mib"] > 100
    assert [(g["group"], g["batch_size"]) for g in record["groups"]] == [
        (name, size) for size in (2, 3) for name in ("lecture", "unet")
    ]
    lecture, unet = record["groups"][:2]
    names = ["lecture", "package step", "package step + average", "package Trainer"]
    names += ["package float32 defaults", "package bf16 defaults"]
    assert list(lecture["rows"])[:6] == names and "U-Net bf16 channels_last" in unet["rows"]
    # the convolutions of the lecture's network, forward (2 FLOP a multiplication) and backward, by hand
    weights = 9 * (64 + 64 * 128 + 128 * 64 + 64)
    linear = 2 * (64 + 64 * 128)
    by_hand = 2 * 2 * 28 * 28 * (3 * weights - 9 * 64) + 2 * (3 * linear - 2 * 64)
    assert lecture["flops_per_step"] == pytest.approx(by_hand, rel=1e-3)
    for group in record["groups"]:
        assert finite(group["rows"]) and finite(group["ratios"]) and finite(group["peak_flops_per_second"])
        for figures in group["rows"].values():
            rate, low, high = (figures[f"images_per_second{end}"] for end in ("", "_low", "_high"))
            assert 0 < low <= high and rate * figures["ms_per_step"] == pytest.approx(1e3 * group["batch_size"])
    assert {f"{name} / lecture" for name in names[1:]} < {*lecture["ratios"]}
    # each share is of the peak of the row's own precision
    peaks = lecture["peak_flops_per_second"]
    for name, figures in lecture["rows"].items():
        peak = peaks["bf16" if "bf16" in name else "32"]
        assert figures["share_of_peak"] * peak == pytest.approx(1e9 * figures["gflops_per_second"])
    assert record["overhead"]["rows"]["Trainer"]["ms_per_step"] > 0
    assert math.isfinite(record["overhead"]["ms_per_step"]) and "Trainer's overhead" in capsys.readouterr().out


def test_bench_train_against_diffusers_or_without(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("bench_train.py", *SHORT, "--only", "diffusers", f"--json={tmp_path}/a.json") == 0
    groups = json.loads((tmp_path / "a.json").read_text())["groups"]
    if not groups:
        assert "diffusers is left out" in capsys.readouterr().err
    for group in groups:
        rows = ["diffusers", "package step on UNet2DModel", "package Trainer on UNet2DModel"]
        rows += ["float32 defaults", "bf16 defaults"]
        assert list(group["rows"]) == rows and finite(group["rows"]) and len(group["ratios"]) == 4


def test_bench_bound_reports_rates_and_memory(run: Callable[..., int], tmp_path: Path) -> None:
    options = [*SHORT, "--forms", "denoising", "trajectory", "--timed_T=3", "--T", "6", "3", "--precision=bf16"]
    assert run("bench_bound.py", *options, f"--json={tmp_path}/a.json") == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert [batch["batch_size"] for batch in record["batches"]] == [2, 3]
    for batch in record["batches"]:
        assert list(batch["rows"]) == ["training forward", "forward", "denoising bound", "trajectory bound"]
        assert finite(batch["rows"]) and finite(batch["ratios"]) and len(batch["ratios"]) == 4
        assert {form: list(sizes) for form, sizes in batch["memory_mib"].items()} == {
            "denoising": ["3", "6"],
            "trajectory": ["3", "6"],
        }
    with pytest.raises(InputError, match="--T 1 must be 2 or more"):
        run("bench_bound.py", "--T", "1")


def test_bench_sample_compares_all(run: Callable[..., int], tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="pip install 'ddpm-lightning[export]'")
    options = [
        "--batch_size=2",
        "--steps=1",
        "--warm_up=1",
        "--ddim_steps=2",
        "--ancestral_steps=2",
        "--rounds=1",
        "--tiny",
    ]
    assert run("bench_sample.py", *options, f"--json={tmp_path}/bench.json") == 0
    groups = json.loads((tmp_path / "bench.json").read_text())["groups"]
    assert [list(group["rows"]) for group in groups] == [
        ["package", "diffusers"],
        ["package", "diffusers", "plain loop"],
    ]
    assert all(finite(group["rows"]) and finite(group["ratios"]) for group in groups)
    with pytest.raises(InputError, match="--ddim_steps 3 must divide 1000"):
        run("bench_sample.py", "--ddim_steps=3")
