"""Observables of samples beside the data: the numbers, the callback, and exact densities."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build, trainer
from conftest import ROOT, run_ddpm_pair

from ddpm_lightning.callbacks import LatticeObservables
from ddpm_lightning.cli import main
from ddpm_lightning.data import Digits, FreeField, Phi4
from ddpm_lightning.data.lattice import by_chain
from ddpm_lightning.errors import InputError
from ddpm_lightning.evaluation.observables import observables_report, observe
from ddpm_lightning.figures import observable_curves
from ddpm_lightning.lattice import free_field_exact, simulate_free_field
from ddpm_lightning.process import PlainGaussian
from ddpm_lightning.runs import Run

TINY = [
    "--data.dim=1", "--data.L=8", "--data.n_train=256", "--data.n_val=64", "--data.n_test=64", "--data.batch_size=64",
    "--model.network.width=8", "--model.network.multipliers=[1,2]", "--model.network.blocks=1",
    "--model.schedule.T=10", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1",
    "--model.lr_scheduler=null",
]  # fmt: skip


def test_chains_are_put_one_after_the_other() -> None:
    # two samples of each of 256 chains, the last sample of most is not there
    rows = torch.arange(256 * 2 + 3)
    ordered, block = by_chain(rows)
    assert block == 2 and ordered.tolist() == [k + 256 * sample for k in range(256) for sample in range(2)]
    assert by_chain(torch.arange(5))[1] == 1


def test_the_error_of_the_data_knows_of_their_correlation() -> None:
    field = FreeField(L=8, dim=1)
    phi = simulate_free_field(8, 1, 0.5, 1024, seed=3).fields
    # chains that never move: four equal samples of each of 256
    stuck = phi[:256].repeat(4, 1, 1)
    free, caught = (observe(field, 0.5, phi[:100], data).data["phi2"] for data in (phi, stuck))
    assert caught.se / free.se == pytest.approx(2, rel=0.25)


def test_samples_are_compared_with_data_and_with_exact_values() -> None:
    data = simulate_free_field(8, 2, 0.5, 4000, seed=0).fields
    alike, wider = simulate_free_field(8, 2, 0.5, 2000, seed=1).fields, 1.2 * data[:500]
    for samples, far in ((alike, False), (wider, True)):
        found = observe(FreeField(L=8, dim=2, m2=0.5), 0.5, samples, data)
        text, (record,) = observables_report([found], "here")
        apart = float(next(line for line in text.splitlines() if line.startswith("phi2")).split()[-2])
        assert (abs(apart) > 5) is far
        assert record["phi2"]["exact"] == free_field_exact(8, 2, 0.5)["variance"]
        assert record["coupling"] == 0.5 and text.startswith("here\n\ncoupling 0.5")
        picture = observable_curves(found.spectra, found.magnetisation)
        assert picture.dtype == torch.uint8 and picture.shape[0] == 3 and picture.float().std() > 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ring of two masses, told which."""
    folder = tmp_path_factory.mktemp("observed")
    callback = ["--trainer.callbacks+=LatticeObservables", "--trainer.callbacks.n=40"]
    main([
        "fit", f"-c={ROOT}/configs/free_field.yaml", f"--data.root={folder}", f"--run_dir={folder}/run", *TINY,
        "--data.m2=[0.5,2.0]", "--model.vector_conditional=true", *callback,
    ])  # fmt: skip
    return folder / "run"


def test_the_run_keeps_the_callbacks_of_the_base_and_the_scale_of_the_vectors(run: Path) -> None:
    scale = Run(run).load_module().model.network.vector_scale
    assert scale == {"mean": [1.25], "std": [0.75]}  # of the couplings 0.5 and 2 in equal shares
    assert (run / "checkpoints/last.ckpt").is_file() and (run / "samples").is_dir()
    assert len([*(run / "observables").glob("step_*@0.5.png")]) == len([*(run / "observables").glob("*@2.png")]) == 2


def test_in_training_they_are_logged_for_each_coupling(tmp_path: Path) -> None:
    data = Phi4(L=4, dim=2, n_train=64, n_val=32, n_test=32, batch_size=32, root=str(tmp_path))
    data.prepare_data()
    module = build(shape=(1, 4, 4), levels=None, scale=data.scale, clip_x0=False, decoder=PlainGaussian())
    fit = trainer(tmp_path, callbacks=[LatticeObservables(n=16)])
    fit.fit(module, data)
    last = fit.callback_metrics
    assert {"observables/phi2", "observables/phi2_data", "standard_error/observables/phi2"} <= set(last)
    assert last["observables/phi2_data"] == pytest.approx(float(data.split("val").images.double().square().mean()))


def test_in_the_test_they_are_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["test", str(run)])
    printed = capsys.readouterr().out
    assert "40 samples in 10 steps, against the test data" in printed
    table = (run / "observables-test.txt").read_text()
    assert table.count("susceptibility") == 2 and table.index("coupling 0.5") < table.index("coupling 2")
    half, two = json.loads((run / "observables-test.json").read_text())
    assert half["susceptibility"]["exact"] == 2 and two["susceptibility"]["exact"] == 0.5
    # of the smaller mass the field is wider, in the data and in samples of a model hardly trained
    assert half["phi2"]["data"]["mean"] > two["phi2"]["data"]["mean"]


@pytest.mark.cli
def test_two_processes_give_the_observables_of_one(run: Path, tmp_path: Path) -> None:
    main(["test", str(run)])
    expected = (run / "observables-test.json").read_text()
    two = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2"]
    where = ["-c", f"{run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt", f"--run_dir={tmp_path}"]
    run_ddpm_pair("test", *where, *two)
    for one, other in zip(
        json.loads(expected), json.loads((tmp_path / "observables-test.json").read_text()), strict=True
    ):
        assert one["phi2"]["samples"]["mean"] == pytest.approx(other["phi2"]["samples"]["mean"], rel=1e-5)


def test_density_of_a_lattice_system_stands_beside_the_exact_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["density", str(run), "--n=20"])
    printed = capsys.readouterr().out
    assert "20 rows of the test split" in printed and "below the exact one by" in printed
    with (run / "density" / "density.csv").open() as file:
        rows = [*csv.DictReader(file)]
    data = FreeField(L=8, dim=1, m2=[0.5, 2.0], n_train=256, n_val=64, n_test=64, root=str(run.parent))
    split = data.split("test")
    for k, row in enumerate(rows):
        m2 = float(split.cond["vector"][k, 0])
        phi = split.images[k, 0].double()
        quadratic = 0.5 * ((phi.roll(-1) - phi).square().sum() + m2 * phi.square().sum())
        exact = -float(quadratic) - free_field_exact(8, 1, m2)["logZ"]
        assert float(row["exact_nats"]) == pytest.approx(exact, abs=1e-4)
    # a bound, of the truth itself: on average below it
    found = json.loads((run / "density" / "density.json").read_text())["figures"]["bound_nats"]["below_exact_a_site"]
    below = np.mean([float(row["exact_nats"]) - float(row["bound_nats"]) for row in rows]) / 8
    assert found["mean"] == pytest.approx(below) and below > 0


def test_of_a_mixture_no_density_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([
        "fit", f"-c={ROOT}/configs/free_field.yaml", f"--data.root={tmp_path}", f"--run_dir={tmp_path}/run", *TINY,
        "--data.m2=[0.5,2.0]", "--trainer.max_epochs=1", "--trainer.limit_val_batches=0",
    ])  # fmt: skip
    main(["density", f"{tmp_path}/run", "--n=4"])
    assert "exact" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"), [({"n": 1}, "n = 1"), ({"steps": 0}, "steps = 0"), ({"seed": -1}, "seed")]
)
def test_numbers_out_of_range_are_refused(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        LatticeObservables(**options)


def test_other_data_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="LatticeObservables is for a lattice system, and the data are Digits"):
        trainer(tmp_path, callbacks=[LatticeObservables()]).fit(build(), Digits())
