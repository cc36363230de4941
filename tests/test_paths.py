"""Samples with the log ratio of their path, and the two commands that weigh samples and rows of a file."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import refused
from conftest import ROOT
from oracles import ScalarGaussianWorld, assert_mean, linear_betas, oracle_model

from ddpm_lightning.cli import main
from ddpm_lightning.errors import InputError
from ddpm_lightning.lattice import free_field_exact
from ddpm_lightning.process import DiscretizedGaussian, HierarchicalVAE, LinearLevel, PlainGaussian
from ddpm_lightning.samplers import draw_paths, effective_sample_size, log_mean_weight

WORLD = ScalarGaussianWorld(0.3, 0.25, linear_betas(8, 0.05, 0.5), "beta")
GENERATOR = torch.Generator()


def test_weights_lead_to_the_target() -> None:
    """The mean weight is Z, and weighted means are the target's, here that of a wider Gaussian than the data's."""
    model = oracle_model(WORLD)
    x_T = model.prior(torch.zeros(40_000, 1, 1, 2).double()).sample(GENERATOR.manual_seed(0))
    paths = draw_paths(model, x_T, GENERATOR)
    target = torch.distributions.Normal(0.4, 0.55)
    log_weights = paths.log_ratio + target.log_prob(paths.x0).sum((1, 2, 3)) + math.log(7.0)
    weights = log_weights.exp()
    assert_mean(weights, 7.0, max_se=0.1)
    log_z, error = log_mean_weight(log_weights)
    assert error < 0.02 and abs(log_z - math.log(7)) < 4 * error
    assert_mean(weights * paths.x0.mean((1, 2, 3)) / 7, 0.4, max_se=0.02)
    assert_mean(weights * paths.x0.square().mean((1, 2, 3)) / 7, 0.4**2 + 0.55**2, max_se=0.02)
    assert 1000 < effective_sample_size(log_weights) < 40_000


def test_of_grey_levels_the_mean_ratio_counts_the_pictures() -> None:
    """Sum over all x_0 of 1: three levels and two pixels make nine pictures."""
    model = oracle_model(WORLD, decoder=DiscretizedGaussian(3))
    x_T = model.prior(torch.zeros(100_000, 1, 1, 2).double()).sample(GENERATOR.manual_seed(1))
    paths = draw_paths(model, x_T, GENERATOR)
    assert set(paths.x0.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert_mean(paths.log_ratio.exp(), 9.0, max_se=0.2)


def test_with_the_exact_posterior_the_ratio_is_one_over_the_density() -> None:
    level = LinearLevel(1)
    model = HierarchicalVAE([level], PlainGaussian(), (1,)).double()
    a, b, v = 0.8, -0.3, 0.5
    with torch.no_grad():
        level.down.weight.fill_(a)
        level.down.bias.fill_(b)
        level.log_var_down.fill_(math.log(v))
        gain = a / (a * a + v)
        level.up.weight.fill_(gain)
        level.up.bias.fill_(-gain * b)
        level.log_var_up.fill_(math.log(1 - gain * a))
    paths = draw_paths(model, torch.randn(50, 1, generator=GENERATOR.manual_seed(2)).double(), GENERATOR)
    log_p = torch.distributions.Normal(*torch.tensor([b, math.sqrt(a * a + v)], dtype=torch.float64)).log_prob(
        paths.x0
    )[:, 0]
    torch.testing.assert_close(paths.log_ratio, -log_p, rtol=1e-10, atol=1e-10)


def test_the_effective_sample_size_of_known_weights() -> None:
    assert effective_sample_size(torch.full((50,), -1000.0)) == pytest.approx(50)
    assert effective_sample_size(torch.tensor([0.0, -1e4, -1e4])) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([3.0, 1.0]).log()) == pytest.approx(16 / 10)
    # log-normal weights: n exp(-s^2), up to the noise of the sums
    log_weights = 0.5 * torch.randn(200_000, generator=GENERATOR.manual_seed(3)).double()
    assert effective_sample_size(log_weights) / 200_000 == pytest.approx(math.exp(-0.25), rel=0.02)
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="log weights hold NaN or infinity"):
            log_mean_weight(torch.tensor([0.0, bad]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ring of the free field, hardly trained, told its mass."""
    folder = tmp_path_factory.mktemp("ring")
    main([
        "fit", f"-c={ROOT}/configs/free_field.yaml", f"--data.root={folder}", f"--run_dir={folder}/run", "--data.dim=1",
        "--data.L=8", "--data.m2=[0.5,2.0]", "--data.n_train=256", "--data.n_val=8", "--data.n_test=8",
        "--data.batch_size=64", "--model.vector_conditional=true", "--model.network.padding=circular",
        "--model.network.width=8", "--model.network.multipliers=[1,2]", "--model.schedule.T=20",
        "--trainer.max_steps=30", "--trainer.max_epochs=-1",
        "--trainer.limit_val_batches=0", "--model.lr_scheduler=null",
    ])  # fmt: skip
    return folder / "run"


def test_reweight_reports_what_can_be_believed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["reweight", str(run), "--n=400", "--coupling=1.0", "--observable=test_paths.largest"])
    found = json.loads((run / "reweight" / "reweight.json").read_text())
    exact = free_field_exact(8, 1, 1.0)
    assert found["exact"]["log_Z"] == exact["logZ"] and found["n"] == 400 and 1 <= found["ess"] <= 400
    assert found["believable"] is (found["ess"] >= 100)
    # trained for seconds: far from exact, but the weights know
    log_z = found["log_Z"]
    assert abs(log_z["mean"] - exact["logZ"]) < 1 + 5 * log_z["se"]
    assert set(found["reweighted"]) == {"phi2", "nn", "|m|", "susceptibility", "Binder cumulant", "test_paths.largest"}
    printed = capsys.readouterr().out
    assert f"exact {exact['logZ']:.4f}" in printed and ("WARNING" in printed) is not found["believable"]
    main(["reweight", str(run), "--n=10", "--coupling=1.0", "--T=3"])
    assert "too small to believe" in capsys.readouterr().out


def largest(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).amax(1)


def wrong(x: torch.Tensor) -> torch.Tensor:
    return x


def failing(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("on\ntwo lines")


def partly_nan(x: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(len(x)) == 3, torch.nan, x.flatten(1).sum(1))


def complex_numbers(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(x), dtype=torch.complex64)


def erased(x: torch.Tensor) -> torch.Tensor:
    return x.zero_().flatten(1).sum(1)


def test_a_function_of_ones_own_changes_no_sample(run: Path) -> None:
    found = []
    for options in ([], ["--observable=test_paths.erased"]):
        main(["reweight", str(run), "--n=20", "--coupling=1", *options])
        found.append(json.loads((run / "reweight" / "reweight.json").read_text())["model"]["phi2"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--coupling=-1"], "--coupling -1: m2 = -1 must be positive"),
        (["--coupling=1", "--target=test_paths.failing"], "line 1"),
        (["--coupling=1", "--observable=test_paths.failing"], "RuntimeError: on two lines"),
        (["--coupling=1", "--target=test_paths.partly_nan"], "returned NaN or infinity for 1 of 20 samples"),
        (["--coupling=1", "--observable=test_paths.partly_nan"], "returned NaN or infinity for 1 of 20 samples"),
        (["--coupling=1", "--observable=test_paths.complex_numbers"], "returned complex numbers: return real ones"),
        (["--coupling=1", "--device=gpu"], "--device gpu cannot be used"),
        ([], "is told a coupling: give --coupling"),
        (["--coupling=1", "--target=no.such"], "--target no.such cannot be imported"),
        (["--coupling=1", "--target=math.pi"], "--target math.pi is no function"),
        (["--coupling=1", "--observable=test_paths.wrong"], "returned shape [20, 1, 8] for data [20, 1, 8]"),
        (["--coupling=1", "--n=9"], "--n 9 must be 10 or more"),
    ],
)
def test_reweight_refuses(run: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, "reweight", str(run), "--n=20", *options)


def test_density_of_the_rows_of_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).normal(size=(6, 1, 8)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=values, m=np.full(6, 0.5))
    told = [f"--data={tmp_path}/rows.npz", "--vector=m"]
    main(["density", str(run), *told, "--flow", "--tolerance=0.5"])
    with (run / "density" / "density.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == list("012345")
    assert all(float(row["flow_error_nats"]) <= 0.5 and math.isfinite(float(row["bound_nats"])) for row in rows)
    printed = capsys.readouterr().out
    assert "a density in the units of the data" in printed and "numerical error of the flow" in printed
    # one row alone, or without an axis of channels, is the same row
    np.savez(tmp_path / "rows.npz", x=values[:3, 0], m=np.full(3, 0.5))
    main(["density", str(run), *told])
    with (run / "density" / "density.csv").open() as file:
        again = list(csv.DictReader(file))
    assert [float(row["bound_nats"]) for row in again] == pytest.approx(
        [float(row["bound_nats"]) for row in rows[:3]], rel=1e-5
    )
    for arrays, options, words in (
        ({"x": values}, [], "this model is told a vector of each row: name its array with --vector"),
        ({"x": values[:, :, :4], "m": np.ones(6)}, told[1:], "has rows of shape [1, 4]; the model's are [1, 8]"),
        ({"x": values.astype(int), "m": np.ones(6)}, told[1:], "holds int64, and the model is one of real numbers"),
        ({"x": values, "m": np.ones(2)}, told[1:], "--vector m: has [2] for 6 rows"),
        ({"x": values, "m": np.full(6, np.nan)}, told[1:], "rows.npz, m, row 0: holds NaN"),
        ({"x": values}, ["--vector=k"], "--vector k: "),
    ):
        np.savez(tmp_path / "rows.npz", **arrays)  # type: ignore[arg-type]
        assert words in refused(capsys, "density", str(run), told[0], *options)
