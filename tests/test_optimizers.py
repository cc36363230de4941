"""Muon with AdamW, the learning rate that ends with the training, and the script that compares optimisers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import compared, differences, refused
from conftest import ROOT, run_ddpm, run_script
from torch import nn

from ddpm_lightning.checkpoints.descriptions import instantiate_arguments, parameters_of
from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import UNet
from ddpm_lightning.runs import Run
from ddpm_lightning.training.optimizers import MuonAdamW, WarmupDecay

TINY = [
    f"--config={ROOT}/configs/quickstart.yaml",
    "--model.network.width=4",
    "--model.schedule.T=4",
    "--trainer.limit_train_batches=5",
    "--trainer.limit_val_batches=1",
]

STOPS = """
from lightning.pytorch import Callback

class AtStep10(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_step == 10
"""


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


# --- MuonAdamW


def test_what_is_no_matrix_is_trained_as_by_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = parameter(1.0, -2.0, 3.0), parameter(1.0, -2.0, 3.0)
    options = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3, "eps": 1e-6}
    pair = MuonAdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        ours.grad = torch.randn(3)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (4, 2, 3, 3)])
def test_a_matrix_moves_by_a_nearly_orthogonal_one(shape: tuple[int, ...]) -> None:
    """All singular values of the step are about lr 0.2 sqrt(max(rows, columns)), along those of the first gradient."""
    torch.manual_seed(0)
    weight, gradient = nn.Parameter(torch.zeros(shape)), torch.randn(shape)
    weight.grad = gradient
    MuonAdamW([weight], lr=0.1).step()
    step = -weight.detach().flatten(1).double()
    unit = 0.1 * 0.2 * max(step.shape) ** 0.5
    singular = torch.linalg.svdvals(step) / unit
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3
    u, _, v = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
    rotated = u.T @ step @ v.T / unit  # diagonal, if the step has the gradient's singular vectors
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), rtol=0, atol=1e-4)


def test_matrices_of_one_shape_move_as_each_would_alone() -> None:
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    alone = [nn.Parameter(weight.detach().clone()) for weight in together]
    optimizers = [MuonAdamW(together, lr=0.1), *(MuonAdamW([weight], lr=0.1) for weight in alone)]
    for _ in range(3):
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn(3, 4)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_weights_without_a_gradient_stay() -> None:
    network = UNet(1, width=4, multipliers=(1,), blocks=1)
    before = [weight.detach().clone() for weight in network.parameters()]
    optimizer = MuonAdamW(network.parameters(), weight_decay=0.1)
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"momentum": 1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MuonAdamW([parameter(1.0)], **options)


class Handing(torch.optim.Optimizer):
    """As many optimisers of libraries: what it does not name goes to a base class, whose ``defaults`` it makes."""

    def __init__(self, params: Any, lr: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(params, {"lr": lr}, **kwargs)


def test_an_optimiser_that_hands_arguments_on_is_made_from_its_description() -> None:
    known = parameters_of(Handing)
    assert known["lr"].default == 1e-3 and known["defaults"].default is None
    made = instantiate_arguments(Handing, {"lr": 0.5}, "optimizer", left_open=1)
    assert Handing([parameter(1.0)], **made).param_groups[0]["lr"] == 0.5


# --- WarmupDecay


def rates(scheduler: WarmupDecay, steps: int) -> list[float]:
    """The learning rate of each step."""
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_the_rate_is_a_triangle() -> None:
    scheduler = WarmupDecay(torch.optim.SGD([parameter(1.0)], lr=12.0), warm_up=0.5, total_steps=6)
    assert rates(scheduler, 8) == pytest.approx([3, 6, 9, 12, 8, 4, 0, 0])
    flat = WarmupDecay(torch.optim.SGD([parameter(1.0)], lr=12.0), warm_up=0, total_steps=4)
    assert rates(flat, 4) == pytest.approx([12, 9, 6, 3])


def test_it_ends_where_the_trainer_does_unless_told_otherwise() -> None:
    for given, end in ((None, 6), (3, 3)):
        scheduler = WarmupDecay(torch.optim.SGD([parameter(1.0)], lr=1.0), total_steps=given)
        scheduler.ends_at(6)
        assert scheduler.total_steps == end
    with pytest.raises(InputError, match=r"which that is: give --trainer\.max_epochs"):
        WarmupDecay(torch.optim.SGD([parameter(1.0)], lr=1.0)).ends_at(float("inf"))


@pytest.mark.parametrize("options", [{"warm_up": 1.0}, {"warm_up": -0.1}, {"total_steps": 0}])
def test_a_schedule_out_of_range_is_refused(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        WarmupDecay(torch.optim.SGD([parameter(1.0)], lr=1.0), **options)


@pytest.mark.cli
def test_a_killed_run_goes_on_with_the_same_rates_and_a_longer_one_with_its_own(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_ddpm("fit", *TINY, f"--run_dir={whole}", "--trainer.max_epochs=4")
    (tmp_path / "stops.py").write_text(STOPS)
    options = ["--trainer.max_epochs=4", "--trainer.callbacks+=stops.AtStep10"]
    run_ddpm("fit", *TINY, f"--run_dir={cut}", *options, cwd=tmp_path)
    assert torch.load(Run(cut).checkpoint("last"), weights_only=True)["global_step"] == 10
    run_ddpm("fit", str(cut), cwd=tmp_path)
    assert differences(*(compared(run / "checkpoints/last.ckpt") for run in (whole, cut))) == []
    run_ddpm("fit", str(whole), "--trainer.max_epochs=8")
    state = torch.load(Run(whole).checkpoint("last"), weights_only=True)
    assert state["lr_schedulers"][0]["total_steps"] == 40
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == 0


@pytest.mark.cli
def test_a_training_without_an_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY, f"--run_dir={tmp_path / 'run'}", "--trainer.max_epochs=-1"]
    assert "WarmupDecay falls to 0 at the last step" in refused(capsys, "fit", *options)


# --- the scripts


@pytest.mark.cli
def test_each_optimiser_takes_the_rate_with_the_best_validation(tmp_path: Path) -> None:
    options = ["--steps=2", "--seeds=1", "--times=1", "--lr", "1e-9", "1e-3", "--only=Adam", f"--out={tmp_path}"]
    done = run_script("compare_optimizers.py", *options)
    assert done.returncode == 0, done.stderr
    for row in json.loads((tmp_path / "optimizers.json").read_text()):
        scores = {float(rate): bits for rate, bits in row["validation"].items()}
        assert row["lr"] == min(scores, key=scores.get) and len(row["test"]) == 1
    assert [line.split()[0] for line in done.stdout.splitlines() if " lr " in line] == ["AdamW", "MuonAdamW"]
    alone = run_script("compare_optimizers.py", *options, "--only=AdamW")  # what is trained is not trained again
    assert [line.split()[0] for line in alone.stdout.splitlines() if " lr " in line] == ["AdamW"]
    assert "none of AdamW, MuonAdamW, SOAP" in run_script("compare_optimizers.py", "--only=Sgd").stderr
