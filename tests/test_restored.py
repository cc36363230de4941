"""A run that goes on with other options: each is applied or refused, and none is ignored."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import OLD_RUN, refused
from conftest import run_ddpm

from ddpm_lightning.runs import Run
from ddpm_lightning.training.restored import changed_options, in_words

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
ONE_CYCLE = ["--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.init_args.max_lr=0.01"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(shutil.copytree(OLD_RUN, tmp_path / "run"))


def saved(run: Run) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    return checkpoint


def go_on(run: Run, *options: str, epochs: int = 3) -> str:
    return run_ddpm("fit", str(run.folder), f"--trainer.max_epochs={epochs}", *options)


def test_equal_options_are_no_change() -> None:
    long = {"class_path": "torch.optim.adamw.AdamW", "init_args": {"lr": 0.001, "weight_decay": 0.01}}
    assert changed_options({"optimizer": ADAMW, "shape": (1, 8, 8)}, {"optimizer": long, "shape": [1, 8, 8]}) == {}


def test_changes_are_named_by_their_path() -> None:
    other = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5}}
    changes = changed_options(
        {"optimizer": other, "lr_scheduler": None, "ema_decay": 0.9},
        {"optimizer": ADAMW, "lr_scheduler": {"class_path": "a.StepLR", "init_args": {}}, "ema_decay": 0.9},
    )
    assert in_words(changes) == "optimizer.lr 0.001 -> 1e-05, lr_scheduler StepLR -> None"


def test_the_learning_rate_asked_for_is_the_one_trained_with(run: Run) -> None:
    before = saved(run)
    assert "optimizer.lr 0.001 -> 1e-05" in go_on(run, "--model.optimizer.init_args.lr=1e-5")
    after = saved(run)
    assert after["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-5
    assert run.config["model"]["optimizer"]["init_args"]["lr"] == 1e-5
    # Adam moves a weight by less than 2 lr a step here, and its moments were kept
    name = "model.network.stem.weight"
    moved = (after["state_dict"][name].cpu() - before["state_dict"][name].cpu()).abs().max()
    assert 0 < moved < 10 * 2e-5
    assert after["optimizer_states"][0]["state"][0]["step"] == 30


def test_the_same_options_change_nothing(run: Run, tmp_path: Path) -> None:
    assert "changed since" not in go_on(run)
    copy = Run(shutil.copytree(OLD_RUN, tmp_path / "copy"))
    go_on(copy, "--model.optimizer.init_args.lr=1e-3")
    one, other = saved(run), saved(copy)
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


def test_a_longer_schedule_is_where_it_would_be_from_the_start(run: Run) -> None:
    go_on(run, *ONE_CYCLE, "--model.lr_scheduler.init_args.total_steps=40")
    output = go_on(run, *ONE_CYCLE, "--model.lr_scheduler.init_args.total_steps=80", epochs=4)
    assert "lr_scheduler.total_steps 40 -> 80" in output
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=80)
    for _ in range(40):
        optimizer.step()
        scheduler.step()
    assert saved(run)["optimizer_states"][0]["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"]
    assert saved(run)["lr_schedulers"][0]["total_steps"] == 80


def test_a_learning_rate_under_a_schedule_starts_from_the_new_one(run: Run) -> None:
    steps = ["--model.lr_scheduler=torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.init_args.step_size=15"]
    go_on(run, *steps)
    go_on(run, *steps, "--model.optimizer.init_args.lr=1e-2", epochs=4)
    assert saved(run)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-2 * 0.1**2, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.parameterization=VParameterization"], "trained with EpsParameterization"),
        (["--model.conditioning=TimeConditioning"], "trained with GammaConditioning"),
        (["--model.network.init_args.width=8"], "--model.network.width 8: the checkpoint was trained with 4"),
        (["--model.optimizer=torch.optim.SGD"], "trained with AdamW"),
        ([*ONE_CYCLE, "--model.lr_scheduler.init_args.total_steps=15"], "15 is less than the 30 steps of training"),
        (
            [*ONE_CYCLE, "--model.lr_scheduler.init_args.total_steps=15", "--trainer.max_epochs=-1"],
            "--model.lr_scheduler OneCycleLR ends at step",
        ),
    ],
)
def test_what_cannot_be_applied_is_refused_and_changes_no_file(
    options: list[str], words: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (run.config_path, run.checkpoint("last"), run.checkpoint("best"))}
    assert words in refused(capsys, "fit", str(run.folder), "--trainer.max_epochs=3", *options)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("command", ["test", "validate", "predict", "sample"])
def test_weights_are_not_read_as_something_else(command: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, command, str(run.folder), "--model.parameterization=VParameterization")
    assert "trained with EpsParameterization" in error


def test_what_is_free_is_applied_in_evaluation(run: Run) -> None:
    output = run_ddpm("test", str(run.folder), "--model.clip_x0=false", "--model.variance=FixedSmallVariance")
    assert "not clipped" in output and "FixedSmallVariance" in output


def test_early_stopping_keeps_the_patience_asked_for(run: Run) -> None:
    def callback(patience: int) -> str:
        monitor = f"{{monitor: val/denoising/bits_per_dim, patience: {patience}}}"
        return f"--trainer.callbacks+={{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor}}}"

    go_on(run, callback(3))
    run.config_path.write_bytes((OLD_RUN / "config.yaml").read_bytes())
    go_on(run, callback(7), epochs=4)
    (state,) = (state for key, state in saved(run)["callbacks"].items() if key.startswith("EarlyStopping"))
    assert state["patience"] == 7
