"""``ddpm sample``."""

import os
from pathlib import Path

import pytest
import torch
from builders import BuiltOnly, refused
from conftest import ROOT, run_ddpm, run_ddpm_pair
from safetensors.torch import load_file

from ddpm_lightning.runs.lock import hold

pytestmark = pytest.mark.cli

CLASSES = [
    "--model.class_conditional=true",
    "--model.label_dropout=0.1",
    "--model.network.init_args.num_classes=10",
]


@pytest.fixture
def guided(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a class-conditional model with random weights."""
    monkeypatch.chdir(ROOT)
    module = BuiltOnly(["fit", *tiny, *CLASSES, f"--run_dir={tmp_path}/run"]).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.ema_model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    torch.save({"state_dict": module.state_dict(), "global_step": 1}, tmp_path / "random.ckpt")
    options = [option for option in tiny if not option.startswith("--trainer")]
    return [*options, *CLASSES, f"--ckpt_path={tmp_path}/random.ckpt", f"--run_dir={tmp_path}/run"]


GUIDED = [
    "--guidance_scale=3", "--labels=[4,2]", "--sampler=DPMSolverSampler", "--sampler.sde=true", "--grid=KarrasGrid",
    "--grid.rho=3",
]  # fmt: skip


def test_two_processes_draw_the_images_of_one(guided: list[str], tmp_path: Path) -> None:
    common = [*guided, *GUIDED, "--n=7", "--steps=5", "--gif=true"]
    two = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2", "--batch_size=3"]
    outputs = [
        run_ddpm("sample", *common, f"--out={tmp_path}/one"),
        run_ddpm_pair("sample", *common, f"--out={tmp_path}/two", *two),
    ]
    for name, output in zip(("one", "two"), outputs, strict=True):
        # nothing but the one line, of one process
        line = f"7 images in {tmp_path}/{name}/samples.safetensors; all of them in "
        lines = [line for line in output.splitlines() if line and "GPU available but not used" not in line]
        assert len(lines) == 1 and lines[0].startswith(line), output
        assert {path.suffix for path in (tmp_path / name).iterdir()} == {".safetensors", ".png", ".gif", ".lock"}
    one, two_ = (load_file(tmp_path / name / "samples.safetensors") for name in ("one", "two"))
    assert torch.equal(one["images"], two_["images"]) and torch.equal(one["labels"], two_["labels"])
    for picture in ("samples.png", "samples.gif"):
        assert (tmp_path / "one" / picture).read_bytes() == (tmp_path / "two" / picture).read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sampler=EulerSampler"], ["EulerSampler"]),
        (["--grid=CubicGrid"], ["CubicGrid"]),
        (["--grid=KarrasGrid", "--grid.rho=0"], ["rho = 0"]),
        (["--labels=[11]"], ["--labels [11]", "between 0 and 9"]),
        (["--mask=mask.png"], ["--known FILE"]),
        (["--known=a.png", "--mask=b.png"], ["--known a.png cannot be read"]),
        (["--inpainting=ReplacementSampler", "--inpainting.resamplings=0"], ["--known FILE"]),
        (["--interpolate_to=4"], ["AncestralSampler", "--sampler DDIMSampler"]),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], guided: list[str], tmp_path: Path, options: list[str], words: list[str]
) -> None:
    message = refused(capsys, "sample", *guided, f"--out={tmp_path}/out", *options)
    assert all(word in message for word in words) and not (tmp_path / "out").exists(), message


def test_a_folder_that_another_process_samples_into(
    capsys: pytest.CaptureFixture[str], guided: list[str], tmp_path: Path
) -> None:
    with hold(tmp_path / "out" / ".samples.lock", "is being sampled into"):
        message = refused(capsys, "sample", *guided, f"--out={tmp_path}/out")
    assert f"{tmp_path}/out is being sampled into by another process (process {os.getpid()} on " in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".samples.lock"]


def test_a_guide(trained: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A smaller network, trained for less long: on one process, on two, and measured."""
    weak = [option for option in tiny if "width" not in option]
    run_ddpm("fit", *weak, "--model.network.width=4", f"--run_dir={tmp_path}/weak", "--trainer.max_steps=3")
    common = ["sample", str(trained), "--n=5", "--steps=4", "--sampler=DDIMSampler"]
    guided = [*common, f"--guide={tmp_path}/weak", "--guidance_scale=2"]
    two = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2", "--batch_size=2"]
    run_ddpm(*common, f"--out={tmp_path}/plain")
    run_ddpm(*guided, f"--out={tmp_path}/one")
    run_ddpm_pair(*guided, f"--out={tmp_path}/two", *two)
    plain, one, other = (
        load_file(tmp_path / name / "samples.safetensors")["images"] for name in ("plain", "one", "two")
    )
    assert torch.equal(one, other) and not torch.equal(one, plain)
    message = refused(capsys, *common, f"--guide={trained}/checkpoints/best.ckpt", f"--out={tmp_path}/no")
    assert "--guidance_scale 1 is the model itself" in message and not (tmp_path / "no").exists()
    measured = ["evaluate", "quality", str(trained), "--n=20", "--steps=2", f"--out={tmp_path}/quality"]
    output = run_ddpm(*measured, f"--guide={trained}/checkpoints/best.ckpt", "--guidance_scale=1.5")
    assert f"guidance scale 1.5 away from {trained}/checkpoints/best.ckpt" in output
