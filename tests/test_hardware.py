"""What ``auto`` stands for on a machine: never a precision or an accelerator that is slower there, or that fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import BuiltOnly, refused
from conftest import run_ddpm

from ddpm_lightning.errors import InputError
from ddpm_lightning.trainer import DiffusionTrainer
from ddpm_lightning.training import hardware
from ddpm_lightning.training.hardware import choose_accelerator, choose_precision, resolve

NONE, AVX512, AMX = {}, {"avx512_bf16": True}, {"avx512_bf16": True, "amx_bf16": True}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CPU by its instructions, the limit that oneDNN is given, and the measured speed of bfloat16 on it."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware.CUDAAccelerator, "is_available", lambda: False)
    monkeypatch.setattr(hardware.MPSAccelerator, "is_available", lambda: False)

    def make(has: dict[str, bool], speed: float | None = None, **limit: str) -> None:
        def timed() -> float:
            assert speed is not None, "nothing was to be timed"
            return speed

        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
        monkeypatch.setattr(hardware, "_speed_of_half", timed)
        for name, value in limit.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    ("has", "limit", "speed", "chosen"),
    [
        (NONE, "", None, "32-true"),
        (AVX512, "", 1.67, "bf16-mixed"),
        (AVX512, "", 0.92, "32-true"),
        (AVX512, "", 1.1, "32-true"),  # within what the time of a block can be wrong by
        (AMX, "", 2.9, "bf16-mixed"),
        (AMX, "AVX2", None, "32-true"),
        (AMX, "AVX512_CORE", None, "32-true"),
        (AMX, "AVX512_CORE_BF16", 0.9, "32-true"),
        (AMX, "avx512_core_amx", 2.9, "bf16-mixed"),
        (AVX512, "ALL", 1.67, "bf16-mixed"),
    ],
)
def test_a_cpu_takes_bfloat16_only_where_it_is_faster(
    machine: Any, has: dict[str, bool], limit: str, speed: float | None, chosen: str
) -> None:
    machine(has, speed, ONEDNN_MAX_CPU_ISA=limit)
    assert choose_precision(on_gpu=False).value == chosen


@pytest.mark.parametrize(("has", "chosen"), [(NONE, "32-true"), (AVX512, "32-true"), (AMX, "bf16-mixed")])
def test_several_processes_decide_without_timing(machine: Any, has: dict[str, bool], chosen: str) -> None:
    machine(has)
    assert choose_precision(on_gpu=False, processes=2).value == chosen
    assert resolve("auto", "auto", devices=2)[1] == resolve("cpu", "auto", num_nodes=2)[1] == chosen


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_that_others_started_are_counted(machine: Any, variable: str) -> None:
    machine(AVX512, **{variable: "2"})
    assert resolve("auto", "auto")[1] == "32-true"


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_takes_bfloat16_where_it_has_it(
    machine: Any, monkeypatch: pytest.MonkeyPatch, native: bool, chosen: str
) -> None:
    machine(NONE)
    monkeypatch.setattr(hardware.CUDAAccelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    accelerator, precision, (line,) = resolve("auto", "auto")
    assert (accelerator, precision) == ("auto", chosen) and f"precision {chosen}: " in line
    assert resolve("cpu", "auto")[1] == "32-true"


def test_half_precision_without_scaled_gradients_is_told() -> None:
    assert resolve("cpu", "16-mixed")[2] == [] and "16-mixed" in resolve("cpu", "16-true")[2][0]


def test_the_speed_is_a_ratio_and_leaves_torch_as_it_was() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert 0.01 < hardware._speed_of_half(seconds=0.05) < 100
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_apples_gpu_is_left_aside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware.MPSAccelerator, "is_available", lambda: True)
    for asked in ("auto", "gpu"):
        choice = choose_accelerator(asked)
        assert choice is not None and choice.value == "cpu" and "no float64" in choice.why
    assert choose_accelerator("cpu") is None
    with pytest.raises(InputError, match=r"--trainer.accelerator mps: .* use cpu"):
        choose_accelerator("mps")
    assert DiffusionTrainer(default_root_dir=tmp_path, logger=False).strategy.root_device.type == "cpu"


def test_mps_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(
        capsys, "fit", "-c", "configs/digits.yaml", f"--run_dir={tmp_path}", "--trainer.accelerator", "mps"
    )
    assert message.startswith("ddpm: error: --trainer.accelerator mps: ") and message.count("\n") == 1


def test_a_run_keeps_the_precision_it_began_with(machine: Any, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    first = ["fit", "-c", "configs/digits.yaml", "--run_dir", run, *("--trainer.accelerator", "cpu")]
    first += ["--trainer.precision", "auto"]
    short = ["--trainer.logger", "false", "--model.network.width", "8", "--trainer.max_steps"]
    machine(AVX512, 2.0)
    assert "precision bf16-mixed: bfloat16 has 2.00 times the speed of float32" in run_ddpm(*first, *short, "1")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["precision"] == "bf16-mixed"
    machine(NONE)  # as on another machine
    for again in ([*first, "--ckpt_path", "last"], ["fit", run]):
        steps = "3" if again[1] == run else "2"
        assert "times the speed" not in run_ddpm(*again, *short, steps)
        config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert config["trainer"]["precision"] == "bf16-mixed"


def test_what_is_asked_for_wins(machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(AVX512)
    monkeypatch.chdir(Path(__file__).parents[1])
    options = [f"--run_dir={tmp_path}", "--trainer.precision=32-true", "--trainer.accelerator=cpu"]
    cli = BuiltOnly(["fit", "-c", "configs/mnist.yaml", *options])
    assert cli.trainer.precision == "32-true"
    assert yaml.safe_load(Path("configs/mnist.yaml").read_text())["trainer"]["precision"] == "auto"
