"""Averages whose width is chosen after training, against sums over every step of a trajectory."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from shutil import copytree

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from builders import build, differences, refused, run_trainer
from conftest import run_ddpm, run_ddpm_pair
from torch import Tensor, nn

from ddpm_lightning.callbacks import LastCheckpoint, PowerAverages
from ddpm_lightning.data import Digits
from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import UNet
from ddpm_lightning.runs import Run
from ddpm_lightning.runs.averages import Snapshots, average
from ddpm_lightning.training import DiffusionModule
from ddpm_lightning.training.ema import WeightAverage
from ddpm_lightning.training.power_average import exponent, fit_profile, power_decay

WIDTHS = [0.01, 0.03, 0.05, 0.1, 0.2, 0.28]


def shares(steps: int, gamma: float) -> np.ndarray:
    """Share of each step in the average: the integral of (gamma + 1) tau^gamma / t^(gamma + 1) over it."""
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    return np.diff(edges)


# --- the mathematics


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_an_exponent_has_its_width(sigma_rel: float) -> None:
    gamma = exponent(sigma_rel)
    tau = (np.arange(200_000) + 0.5) / 200_000
    profile = (gamma + 1) * tau**gamma
    mean = (profile * tau).mean()
    assert np.sqrt((profile * (tau - mean) ** 2).mean()) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, -0.1, 0.29, 1e-320, float("nan"), float("inf")])
def test_widths_that_there_are_not(value: float) -> None:
    with pytest.raises(InputError, match=r"sigma_rel = .* must lie between 0\.01 and 0\.28"):
        exponent(value)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_average_is_the_sum_over_all_steps(sigma_rel: float) -> None:
    model, kept = nn.Linear(3, 2).double(), nn.Linear(3, 2).double().requires_grad_(False)
    gamma, trajectory, generator = exponent(sigma_rel), [], torch.Generator().manual_seed(0)
    running = WeightAverage(kept, model)
    for step in range(1, 201):
        with torch.no_grad():
            model.weight += torch.randn(2, 3, generator=generator, dtype=torch.float64)
        trajectory.append(model.weight.detach().clone())
        running.update(power_decay(step, gamma))
    expected = torch.einsum("i,iab->ab", torch.from_numpy(shares(200, gamma)), torch.stack(trajectory))
    torch.testing.assert_close(kept.weight, expected, rtol=1e-11, atol=1e-11)


def snapshots(n: int, steps: int, widths: tuple[float, ...] = (0.05, 0.1)) -> tuple[np.ndarray, np.ndarray]:
    times = np.repeat(steps / n * np.arange(1.0, n + 1), len(widths))
    return times, np.tile([exponent(width) for width in widths], n)


def test_a_profile_that_was_kept_is_returned_to_the_bit() -> None:
    times, gammas = snapshots(8, 800)
    for i in range(16):
        known = times <= times[i]
        x, error = fit_profile(times[known], gammas[known], times[i], gammas[i])
        assert x.tolist() == [float(j == i) for j in range(known.sum())] and error < 1e-7


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2])
def test_the_error_of_a_profile(sigma_rel: float) -> None:
    """As it is by quadrature; least among the weights of sum 1; and smaller with more snapshots."""
    gamma, errors, generator = exponent(sigma_rel), [], np.random.default_rng(0)
    tau = (np.arange(100_000) + 0.5) / 100_000
    wanted = (gamma + 1) * tau**gamma
    for n in (4, 8, 16):
        times, gammas = snapshots(n, 1)
        known = np.where(tau < times[:, None], (gammas[:, None] + 1) * (tau / times[:, None]) ** gammas[:, None], 0)
        known /= times[:, None]
        x, error = fit_profile(times, gammas, 1.0, gamma)
        assert x.sum() == pytest.approx(1, abs=1e-12)

        def off(weights: np.ndarray, known: np.ndarray = known) -> float:
            return float(np.sqrt(((weights @ known - wanted) ** 2).mean() / (wanted**2).mean()))

        assert off(x) == pytest.approx(error, rel=0.02)
        for _ in range(20):
            other = generator.normal(size=2 * n)
            assert off(x + 0.003 * (other - other.mean())) > off(x)
        errors.append(error)
    assert all(a > 1.5 * b for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.15])
def test_an_average_is_as_near_as_its_profile(sigma_rel: float) -> None:
    """|sum x_i theta_i - theta| <= |error of the profile| |theta - its mean|, over time (Cauchy and Schwarz)."""
    steps, gamma = 800, exponent(sigma_rel)
    walk = np.random.default_rng(1).normal(size=(steps, 50)).cumsum(0) + 1000
    times, gammas = snapshots(8, steps)
    x, error = fit_profile(times, gammas, steps, gamma)
    kept = np.stack([shares(int(t), g) @ walk[: int(t)] for t, g in zip(times, gammas, strict=True)])
    off = np.abs(x @ kept - shares(steps, gamma) @ walk)
    norm = (gamma + 1) / np.sqrt((2 * gamma + 1) * steps)
    bound = error * norm * np.sqrt(((walk - walk.mean(0)) ** 2).sum(0))
    assert (off <= bound).all() and off.max() > 0.01 * bound.max()


# --- in training


class Trajectory(pl.Callback):
    """The weights after each step, float64."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step > len(self.weights):
            self.weights.append(flat(pl_module.model.state_dict()))


def flat(state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()]).double()


def tiny() -> DiffusionModule:
    torch.manual_seed(0)
    return build(network=UNet(1, width=4, multipliers=(1,), blocks=1))


def run(folder: Path, *callbacks: pl.Callback, ckpt_path: str | None = None, **options: object) -> pl.Trainer:
    """Epochs of five batches."""
    runner = run_trainer(folder, *callbacks, LastCheckpoint(), **{"limit_val_batches": 0, "max_epochs": 7, **options})
    runner.fit(tiny(), Digits(batch_size=256), ckpt_path=ckpt_path)
    return runner


def test_averages_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = Trajectory()
    run(tmp_path, seen, PowerAverages(every_n_train_steps=1, keep=16))
    steps, weights = len(seen.weights), torch.stack(seen.weights)
    assert steps == 35
    # 35 is more than 16 times 1 and 2
    assert Snapshots(Run(tmp_path)).steps() == list(range(4, 36, 4))
    for step in (8, 32):
        for width, kept in Snapshots(Run(tmp_path)).read(step).items():
            expected = torch.from_numpy(shares(step, exponent(float(width)))) @ weights[:step]
            torch.testing.assert_close(flat(kept), expected, rtol=1e-5, atol=1e-6)

    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    raw = {name: value for name, value in last["state_dict"].items() if not name.startswith("ema_model.")}
    for width in ("0.05", "0.1"):
        made = average(str(tmp_path), float(width))
        file = torch.load(made["path"], weights_only=True)
        kept = {
            f"ema_model.{name}": value for name, value in last["callbacks"]["PowerAverages"]["averages"][width].items()
        }
        assert differences(file["state_dict"], {**raw, **kept}) == []
    for width in (0.07, 0.15):
        made = average(str(tmp_path), width)
        module = Run(tmp_path).load_module(made["path"])
        gamma = exponent(width)
        off = (flat(module.ema_model.state_dict()) - torch.from_numpy(shares(steps, gamma)) @ weights).abs()
        spread = (weights - weights.mean(0)).norm(dim=0)
        bound = made["error"] * (gamma + 1) / np.sqrt((2 * gamma + 1) * steps) * spread
        assert made["step"] == steps and (off <= bound + 1e-6).all() and made["error"] < 0.05
        assert module.sigma_rel == width and module.steps_trained == 35
    assert f"{tmp_path}/checkpoints/ema-0.15.ckpt: the average of sigma_rel 0.15 at step 35" in capsys.readouterr().out
    assert Run(tmp_path).load_module().sigma_rel is None


def test_the_model_is_trained_as_without(tmp_path: Path) -> None:
    states = []
    for name, callbacks in (("with", [PowerAverages(every_n_train_steps=2)]), ("without", [])):
        run(tmp_path / name, *callbacks, max_steps=7)
        states.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert differences(*states) == []


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "accumulated"])
def test_a_run_that_goes_on_keeps_the_averages_of_one_left_alone(options: dict, tmp_path: Path) -> None:
    """From a checkpoint that is older than the snapshots, too; the files of steps that are taken again go first."""

    def kept(folder: Path) -> dict[str, object]:
        last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        found = Snapshots(Run(folder))
        return {"last": last["callbacks"], **{str(step): found.read(step) for step in found.steps()}}

    def averages() -> PowerAverages:
        return PowerAverages(every_n_train_steps=1, keep=4)

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(straight, averages(), **options)
    run(broken, averages(), max_steps=6, **options)
    copytree(broken, tmp_path / "copy")
    run(broken, averages(), ckpt_path=str(broken / "checkpoints/last.ckpt"), max_steps=9, **options)
    run(broken, averages(), ckpt_path=str(tmp_path / "copy/checkpoints/last.ckpt"), **options)
    expected = kept(straight)
    assert len(expected) > 2 and differences(expected, kept(broken)) == []


def test_what_is_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"keep": 1}, "keep = 1 must be 2 or more"),
        ({"every_n_train_steps": 0}, "every_n_train_steps = 0 must be 1 or more"),
        ({"widths": []}, r"widths = \[\] must name one"),
        ({"widths": [0.5]}, "sigma_rel = 0.5 must lie"),
    ):
        with pytest.raises(InputError, match=words):
            PowerAverages(**options)
    run(tmp_path, max_steps=2)
    last = str(tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(
        InputError, match=r"step 2 does not hold the averages 0\.05, 0\.1, which are kept from the first"
    ):
        run(tmp_path, PowerAverages(), ckpt_path=last)
    with pytest.raises(InputError, match=r"holds no averages: train with -c configs/overlays/power_averages\.yaml"):
        average(str(tmp_path), 0.1)
    run(tmp_path / "new", PowerAverages(), max_steps=2)
    with pytest.raises(InputError, match=r"does not hold the averages 0\.05"):
        run(tmp_path / "new", PowerAverages(widths=[0.05]), ckpt_path=str(tmp_path / "new/checkpoints/last.ckpt"))
    with pytest.raises(
        InputError, match=r"sigma_rel = 0\.2 cannot be made of 2 averages of widths 0\.05, 0\.1: the error"
    ):
        average(str(tmp_path / "new"), 0.2)


@pytest.mark.parametrize("kind", ["shape", "width", "form", "nan"])
def test_averages_that_are_damaged(kind: str, tmp_path: Path) -> None:
    run(tmp_path, PowerAverages(), max_steps=2)
    path = tmp_path / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    averages = checkpoint["callbacks"]["PowerAverages"]["averages"]
    name = next(iter(averages["0.05"]))
    if kind == "shape":
        averages["0.05"][name] = torch.zeros(3)
    elif kind == "width":
        averages["wide"] = averages.pop("0.05")
    elif kind == "form":
        averages["0.05"] = 3
    else:
        averages["0.05"][name] = averages["0.05"][name] * float("nan")
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match=r"last\.ckpt: its averages are damaged"):
        average(str(tmp_path), 0.1)
    if kind in ("shape", "form"):
        with pytest.raises(InputError):
            run(tmp_path, PowerAverages(), ckpt_path=str(path))


@pytest.mark.cli
def test_from_the_command_line(tiny_averages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ddpm("fit", *tiny_averages, f"--run_dir={tmp_path}/one")
    output = run_ddpm("average", f"{tmp_path}/one", "--sigma_rel=0.12")
    path = f"{tmp_path}/one/checkpoints/ema-0.12.ckpt"
    assert f"Take it as --ckpt_path {path}" in output
    run_ddpm("test", f"{tmp_path}/one", f"--ckpt_path={path}")
    record = json.loads((tmp_path / "one/bound-test.json").read_text())
    assert record["sigma_rel"] == 0.12 and "ema_decay" not in record and record["steps_trained"] == 20
    run_ddpm("sample", f"{tmp_path}/one", f"--ckpt_path={path}", "--n=2")
    message = refused(capsys, "fit", f"{tmp_path}/one", f"--ckpt_path={path}", "--trainer.max_epochs=3")
    assert "it can be evaluated, but training cannot go on from it" in message
    message = refused(capsys, "average", f"{tmp_path}/one", "--sigma_rel=3")
    assert "--sigma_rel 3 must lie between 0.01 and 0.28" in message
    message = refused(
        capsys, "fit", *tiny_averages, "-c", "configs/overlays/fsdp.yaml", f"--run_dir={tmp_path}/sharded"
    )
    assert "PowerAverages keeps whole weights" in message


@pytest.mark.cli
def test_two_processes_keep_the_averages_of_one(tiny_averages: list[str], tmp_path: Path) -> None:
    two = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2"]
    run_ddpm("fit", *tiny_averages, f"--run_dir={tmp_path}/one", "--trainer.accelerator=cpu")
    run_ddpm_pair("fit", *tiny_averages, f"--run_dir={tmp_path}/two", *two)
    a, b = (Snapshots(Run(tmp_path / name)) for name in ("one", "two"))
    assert a.steps() == b.steps() == [5, 10, 15, 20]
    for step in a.steps():
        for width, kept in a.read(step).items():
            # sums in another order
            torch.testing.assert_close(flat(kept), flat(b.read(step)[width]), rtol=0, atol=1e-3)


@pytest.fixture
def tiny_averages(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    overlay = ["-c", "configs/overlays/power_averages.yaml", "--trainer.callbacks.every_n_train_steps=5"]
    return [*tiny[:2], *overlay, *tiny[2:], "--trainer.max_epochs=2"]
