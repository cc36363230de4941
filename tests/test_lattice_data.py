"""Lattice systems as data: what is simulated, and the files where it is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ddpm
from safetensors.torch import load_file
from torch import Tensor

from ddpm_lightning.data import FreeField, Ising, Phi4, lattice
from ddpm_lightning.errors import InputError
from ddpm_lightning.lattice import (
    binder_cumulant,
    energy,
    free_field_exact,
    ising_exact,
    mean_square,
    neighbour_product,
    phi4_ring_exact,
)


def ising(root: Path, **options: Any) -> Ising:
    return Ising(**{"L": 8, "n_train": 600, "n_val": 5, "n_test": 300, "root": str(root), **options})


@pytest.fixture
def no_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("simulated again")

    for name in ("simulate_ising", "simulate_phi4", "simulate_free_field"):
        monkeypatch.setattr(lattice, name, fail)


def test_ising_facts_and_energy(tmp_path: Path) -> None:
    data = ising(tmp_path, batch_size=50)
    assert (data.shape, data.levels, data.num_classes) == ((1, 8, 8), 2, 1)
    data.prepare_data()
    data.setup()
    for name, count in (("train", 600), ("val", 5), ("test", 300)):
        split = data.split(name)  # type: ignore[arg-type]
        assert split.images.shape == (count, 1, 8, 8) and split.images.dtype == torch.uint8
        assert set(split.images.unique().tolist()) == {0, 1} and not split.labels.any()
    exact = ising_exact(8, 0.44)["energy_per_spin"]
    for name in ("train", "test"):
        found = energy(2.0 * data.split(name).images - 1)  # type: ignore[arg-type]
        assert found.se < 0.02 and abs(found.mean - exact) < 4.5 * found.se
    assert len(data.train_dataloader()) == 12 and next(iter(data.train_dataloader())).image.shape == (50, 1, 8, 8)


def rows(images: Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in images}


def test_splits_and_seeds_have_no_configuration_in_common(tmp_path: Path) -> None:
    # at beta = 0.1 two of 2^64 states are hardly ever equal
    drawn = [
        rows(ising(tmp_path, beta=0.1, simulation_seed=seed).split(name).images)  # type: ignore[arg-type]
        for seed in (0, 1, 2)
        for name in ("train", "val", "test")
    ]
    assert len(set.union(*drawn)) == sum(map(len, drawn)) == 3 * 905


def test_the_order_of_training_is_another_seed(tmp_path: Path) -> None:
    one, other = (ising(tmp_path, seed=seed) for seed in (0, 1))
    assert torch.equal(one.split("train").images, other.split("train").images)
    assert not torch.equal(*(next(iter(data.train_dataloader())).index for data in (one, other)))


def test_a_simulation_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str], request: Any) -> None:
    first = ising(tmp_path).split("val").images
    file = tmp_path / "lattice" / "ising-L8-beta0.44-val-n5-seed0-v1.npy"
    assert [*file.parent.iterdir()] == [file]
    assert capsys.readouterr().err == f"simulating 5 configurations: {file}\n"
    assert np.array_equal(np.load(file), first.numpy())
    request.getfixturevalue("no_simulation")
    again = ising(tmp_path).split("val").images
    assert torch.equal(first, again) and capsys.readouterr().err == ""
    again[:] = 0  # memory of its own, not the file
    assert torch.equal(first, ising(tmp_path).split("val").images)


@pytest.mark.parametrize("other", [{"L": 9}, {"beta": 0.4400000001}, {"n_val": 6}, {"simulation_seed": 1}])
def test_other_parameters_are_another_file(other: dict[str, Any], tmp_path: Path) -> None:
    ising(tmp_path).split("val")
    found = ising(tmp_path, **other).split("val").images
    assert len([*(tmp_path / "lattice").iterdir()]) == 2
    assert torch.equal(found, ising(tmp_path / "elsewhere", **other).split("val").images)


DAMAGE = {
    "truncated": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda _: b"",
    "one spin": lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    "header": lambda content: content.replace(b"|u1", b"|b1"),
    "checksum": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "something else": lambda content: b"x" * len(content),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again(damage: str, tmp_path: Path) -> None:
    first = ising(tmp_path).split("val").images
    (file,) = (tmp_path / "lattice").iterdir()
    content = file.read_bytes()
    file.write_bytes(DAMAGE[damage](content))
    assert file.read_bytes() != content
    assert torch.equal(ising(tmp_path).split("val").images, first)
    assert file.read_bytes() == content and [*file.parent.iterdir()] == [file]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "lattice").write_text("a file")
    with pytest.raises(InputError, match=r"cannot be written .*--data.root"):
        ising(tmp_path).prepare_data()
    (tmp_path / "there/lattice/ising-L8-beta0.44-val-n5-seed0-v1.npy").mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be read"):
        ising(tmp_path / "there").split("val")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(InputError, match="No space left on device"):
            ising(tmp_path).split("val")
    assert [*(tmp_path / "lattice").iterdir()] == []


@pytest.mark.parametrize(
    "options",
    [{"L": 1}, {"beta": 0.0}, {"n_train": 0}, {"n_val": 0}, {"n_test": -1}, {"simulation_seed": -1}, {"seed": -1}],
)
def test_arguments_that_make_no_sense_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        ising(tmp_path, **options)


def train_of(data: FreeField | Phi4) -> torch.Tensor:
    return data.split("train").images


def test_fields(tmp_path: Path, request: Any) -> None:
    sizes: dict[str, Any] = {"n_train": 2000, "n_val": 2000, "n_test": 2000, "root": str(tmp_path), "dim": 1}
    free, ring = FreeField(32, m2=0.5, **sizes), Phi4(16, kappa=0.3, lam=0.1, **sizes)
    exact, ring_exact = free_field_exact(32, 1, 0.5), phi4_ring_exact(16, 0.3, 0.1)
    assert train_of(free).shape == (2000, 1, 32) and train_of(free).dtype == torch.float32
    for found, value in (
        (mean_square(train_of(free)), exact["variance"]),
        (neighbour_product(train_of(free)), exact["neighbour_covariance"]),
        (mean_square(train_of(ring)), ring_exact["phi2"]),
        (neighbour_product(train_of(ring)), ring_exact["nn"]),
    ):
        assert found.se < 0.03 and abs(found.mean - value) < 4.5 * found.se
    assert abs(binder_cumulant(train_of(free)).mean) < 0.2
    assert free.scale["std"][0] == pytest.approx(float(train_of(free).double().square().mean().sqrt()))
    others = [free.split(split).images for split in ("val", "test")]  # type: ignore[arg-type]
    others.append(train_of(FreeField(32, m2=0.5, simulation_seed=1, **sizes)))
    assert len(set.union(*map(rows, [train_of(free), *others]))) == 8000
    request.getfixturevalue("no_simulation")
    assert torch.equal(train_of(FreeField(32, m2=0.5, **sizes)), train_of(free))
    assert torch.equal(train_of(Phi4(16, kappa=0.3, lam=0.1, **sizes)), train_of(ring))


def test_several_couplings_are_a_condition(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"n_train": 3001, "n_val": 4, "n_test": 4, "root": str(tmp_path), "dim": 1}
    data = FreeField(16, m2=[0.5, 2.0], **sizes)
    split = data.split("train")
    assert data.vector_size == 1 and Phi4().vector_size is None
    for m2, count in ((0.5, 1501), (2.0, 1500)):
        of_it = split.images[split.cond["vector"][:, 0] == m2]
        found = mean_square(of_it)
        assert len(of_it) == count and abs(found.mean - free_field_exact(16, 1, m2)["variance"]) < 4.5 * found.se
    assert sorted(data.split("val").cond["vector"].flatten().tolist()) == [0.5, 0.5, 2.0, 2.0]


def test_fields_name_what_is_wrong(tmp_path: Path) -> None:
    root: dict[str, Any] = {"root": str(tmp_path)}
    for call, name in (
        (lambda: train_of(Phi4(lam=-1.0, **root)), "lam = -1"),
        (lambda: Phi4(n_train=0, **root), "n_train = 0"),
        (lambda: Phi4(kappa=[], **root), r"--data.kappa \[\]: a list of couplings must hold one"),
        (lambda: FreeField(m2=[], **root), r"--data.m2 \[\]: a list"),
        (lambda: FreeField(m2=[0.5, -1.0], **root), "m2 = -1"),
        (lambda: Phi4(kappa=1e300, **root), r"kappa = 1e\+300 must be finite"),
        (lambda: train_of(Phi4(L=4, kappa=1e10, n_train=4, **root)), r"kappa = 1e\+10 with lam .* cannot be simulated"),
        (lambda: train_of(FreeField(L=4, m2=1e-300, n_train=4, **root)), "m2 = 1e-300 leads to fields that float32"),
        (lambda: train_of(FreeField(L=4, m2=1e300, n_train=4, **root)), r"m2 = 1e\+300 leads to fields that float32"),
        (lambda: FreeField(dim=4, **root), "dim = 4 must be 1, 2 or 3"),
        (lambda: train_of(FreeField(m2=0.0, **root)), "m2 = 0"),
    ):
        with pytest.raises(InputError, match=name):
            call()
    assert not (tmp_path / "lattice").exists()


@pytest.mark.cli
def test_the_configuration_trains_is_tested_and_samples(tmp_path: Path) -> None:
    common = [f"--data.root={tmp_path}", f"--run_dir={tmp_path}/run", "--data.limit_val=8", "--data.limit_test=8"]
    common += [f"--data.n_{split}=64" for split in ("train", "val", "test")]
    small = ["--model.network.width=8", "--model.schedule.T=12", "--data.batch_size=32", "--trainer.max_epochs=1"]
    output = run_ddpm("fit", "-c", "configs/ising.yaml", *common, *small, "--trainer.check_val_every_n_epoch=1")
    assert "on Ising (64 training images)" in output
    saved = ["-c", f"{tmp_path}/run/config.yaml", *common, "--ckpt_path=last"]
    assert "bits/dim" in run_ddpm("test", *saved)
    run_ddpm("sample", *saved, "--n=4", f"--out={tmp_path}/samples")
    drawn = load_file(tmp_path / "samples/samples.safetensors")["images"]
    assert drawn.shape == (4, 1, 16, 16) and int(drawn.max()) <= 1
