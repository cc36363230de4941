"""Fields of real numbers: files, splits, standardisation, conditions, and a run from the file to samples."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from builders import Evil, refused
from conftest import ROOT
from safetensors.torch import load_file

from ddpm_lightning.cli import main
from ddpm_lightning.configuration import read
from ddpm_lightning.data import Fields
from ddpm_lightning.data.transforms import GreyLevels, Standardized, scale_of
from ddpm_lightning.errors import InputError
from ddpm_lightning.figures import fields_in_grey, tile
from ddpm_lightning.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore:.*The number of training batches.*")
VALUES = np.random.default_rng(0).normal(3.0, 2.0, (50, 2, 4, 6)).astype(np.float32)
VALUES[:, 1] *= 10
T = np.linspace(0, 1, 50)
KINDS = np.arange(50) % 3


def written(folder: Path, kind: str, **more: np.ndarray) -> str:
    """The values in a file of each kind, with other arrays beside them where it can hold them."""
    path = folder / f"my.{kind.removeprefix('compressed ')}"
    arrays = {"fields": VALUES, **more}
    if kind == "npy":
        np.save(path, VALUES)
    elif kind == "npz":
        np.savez(path, **arrays)
    elif kind == "compressed npz":
        np.savez_compressed(path, **arrays)
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    else:
        group = zarr.open_group(str(path), mode="w")
        for name, values in arrays.items():
            group.create_array(name, data=values)
    return str(path)


@pytest.mark.parametrize("memory_gb", [2.0, 0.0])
@pytest.mark.parametrize("kind", ["npy", "npz", "compressed npz", "h5", "zarr"])
def test_every_kind_of_file_gives_the_same_batches(kind: str, memory_gb: float, tmp_path: Path) -> None:
    if kind == "compressed npz" and not memory_gb:
        with pytest.raises(InputError, match=r"is compressed and holds .* more than --data.memory_gb 0"):
            Fields(written(tmp_path, kind), memory_gb=memory_gb).split("train")
        return
    data = Fields(written(tmp_path, kind), memory_gb=memory_gb, batch_size=7)
    assert data.shape == (2, 4, 6) and data.sizes == {"train": 40, "val": 5, "test": 5} and data.levels is None
    rows = np.concatenate([data._rows[name] for name in ("train", "val", "test")])
    assert sorted(rows) == list(range(50)) and rows[:40].tolist() != list(range(40))
    for name in ("train", "val", "test"):
        chosen = torch.tensor([3, 0, 4, 3])  # not in order, one twice
        batch = data.split(name).batch(chosen)  # type: ignore[arg-type]
        assert batch.image.dtype == torch.float32 and np.array_equal(batch.image, VALUES[data._rows[name][chosen]])  # type: ignore[index]
    train = VALUES[data._rows["train"]].astype(np.float64)
    np.testing.assert_allclose(data.scale["mean"], train.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(data.scale["std"], train.std((0, 2, 3)), rtol=1e-10)
    batch = next(iter(data.train_dataloader()))
    assert len(batch.image) == 7 and np.array_equal(batch.image, VALUES[data._rows["train"][batch.index]])


def test_splits_belong_to_the_seed_or_to_files(tmp_path: Path) -> None:
    path = written(tmp_path, "npy")
    first, again, other = Fields(path), Fields(path), Fields(path, split_seed=1)
    assert np.array_equal(first._rows["val"], again._rows["val"])
    assert not np.array_equal(first._rows["val"], other._rows["val"])
    np.save(tmp_path / "val.npy", VALUES[:9] + 1)
    given = Fields(path, val_path=str(tmp_path / "val.npy"))
    assert given.sizes == {"train": 45, "val": 9, "test": 5}
    assert np.array_equal(given.split("val").images, VALUES[:9] + 1)


def test_standardisation_is_undone_exactly() -> None:
    scale = Standardized([3.0, -2.0], [2.0, 1e3])
    x = torch.from_numpy(VALUES)
    z = scale.to_model(x)
    torch.testing.assert_close(scale.to_data(z), x, rtol=3e-7, atol=1e-6)
    assert z.dtype == torch.float32 and abs(float(z[:, 0].mean())) < 0.1
    # the change of variables: log p(x) = log p(z) - sum log std, on a Gaussian
    p_z = torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).sum((1, 2, 3))
    shape = (1, 2, 1, 1)
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(shape) for values in (scale.mean, scale.std))
    p_x = torch.distributions.Normal(mean, std).log_prob(x.double()).sum((1, 2, 3))
    torch.testing.assert_close(p_z + scale.density_nats((2, 4, 6)), p_x, rtol=1e-5, atol=1e-4)
    assert GreyLevels(17).density_nats((1, 8, 8)) == pytest.approx(-64 * math.log(8))
    for wrong in ((17, {"mean": [0.0], "std": [1.0]}), (None, None)):
        with pytest.raises(InputError, match="data have either levels"):
            scale_of(*wrong)


def test_conditions_come_from_the_same_file(tmp_path: Path) -> None:
    path = written(tmp_path, "npz", t=T, phase=KINDS, mask=VALUES[:, :1])
    data = Fields(path, label="phase", vector="t", field="mask")
    assert (data.num_classes, data.vector_size, data.field_channels) == (3, 1, 1)
    batch, rows = data.split("val").batch(torch.arange(5)), data._rows["val"]
    assert np.array_equal(batch.label, KINDS[rows]) and np.array_equal(batch.cond["field"], VALUES[rows][:, :1])
    np.testing.assert_allclose(batch.cond["vector"], T[rows][:, None], rtol=1e-6)


def nan_in_row_17(folder: Path) -> dict[str, Any]:
    values = VALUES.copy()
    values[17, 0, 2, 2] = np.nan
    np.save(folder / "nan.npy", values)
    return {"path": str(folder / "nan.npy")}


def saved(values: Any, name: str = "bad.npy") -> Any:
    def save(folder: Path) -> dict[str, Any]:
        np.save(folder / name, values)
        return {"path": str(folder / name)}

    return save


def text(folder: Path) -> dict[str, Any]:
    (folder / "notes.txt").write_text("no array")
    return {"path": str(folder / "notes.txt")}


def damaged(folder: Path) -> dict[str, Any]:
    path = Path(written(folder, "npz"))
    path.write_bytes(path.read_bytes()[:200])
    return {"path": str(path)}


def other_shape(folder: Path) -> dict[str, Any]:
    np.save(folder / "val.npy", VALUES[:, :1])
    return {"path": written(folder, "npy"), "val_path": str(folder / "val.npy")}


def changed(kind: str, change: Any, **more: Any) -> Any:
    """The values in a file whose bytes are changed."""

    def make(folder: Path) -> dict[str, Any]:
        path = Path(written(folder, kind))
        path.write_bytes(change(path.read_bytes()))
        return {"path": str(path), **more}

    return make


def spoilt(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + b"\xff" * 40 + content[middle + 40 :]


def encrypted(content: bytes) -> bytes:
    """Its flags say so, in the member's own header and in the directory."""
    flags = bytearray(content)
    flags[6] |= 1
    flags[content.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(flags)


def pipe(name: str) -> Any:
    def make(folder: Path) -> dict[str, Any]:
        os.mkfifo(folder / name)
        return {"path": str(folder / name)}

    return make


def pickled(folder: Path) -> dict[str, Any]:
    np.save(folder / "bad.npy", np.array([Evil(f"touch {folder}/executed")] * 9), allow_pickle=True)
    return {"path": str(folder / "bad.npy")}


def hdf5(write: Any, **more: Any) -> Any:
    def make(folder: Path) -> dict[str, Any]:
        with h5py.File(folder / "bad.h5", "w") as file:
            write(file)
        return {"path": str(folder / "bad.h5"), **more}

    return make


def zarr_without(folder: Path, chunk: bytes | None) -> dict[str, Any]:
    """No metadata, or other bytes in the place of each chunk."""
    zarr.save(str(folder / "bad.zarr"), VALUES)
    for path in [each for each in (folder / "bad.zarr").rglob("*") if each.is_file()]:
        if chunk is None and path.name == "zarr.json":
            path.unlink()
        elif chunk is not None and path.name != "zarr.json":
            path.write_bytes(chunk)
    return {"path": str(folder / "bad.zarr")}


def two_files(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray], **more: str) -> Any:
    def make(folder: Path) -> dict[str, Any]:
        np.savez(folder / "mine.npz", fields=VALUES, **mine)
        np.savez(folder / "val.npz", fields=VALUES, **theirs)
        return {"path": str(folder / "mine.npz"), "val_path": str(folder / "val.npz"), **more}

    return make


BAD = {
    "missing": (lambda _: {"path": "/no/such.npy"}, "--data.path /no/such.npy: there is no such file"),
    "kind": (text, "give a .npy, .npz, .h5, .hdf5 or .zarr file"),
    "damaged": (damaged, "cannot be read: File is not a zip file"),
    "nan": (nan_in_row_17, "nan.npy, row 17: holds NaN or infinity"),
    "rank 2": (saved(VALUES[:, 0, 0]), "holds an array of shape [50, 6]: fields are [N, C, *space]"),
    "rank 6": (saved(VALUES[..., None, None]), "one to three dimensions of space"),
    "integers": (saved(VALUES.astype(np.int32)), "holds int32 numbers, and fields are real: save it with .astype"),
    "objects": (saved(np.array([None] * 5)), "holds object and no real numbers"),
    "complex": (saved(VALUES.astype(complex)), "holds complex128 and no real numbers"),
    "few": (saved(VALUES[:2]), "holds 2 fields: too few for training, validation and test"),
    "no rows": (saved(VALUES[:0]), "holds an array of shape [0, 2, 4, 6]"),
    "key": (lambda f: {"path": written(f, "h5"), "key": "x"}, "--data.key x: "),
    "listed": (lambda f: {"path": written(f, "h5", t=T), "key": "x"}, "holds the arrays fields, t"),
    "which": (
        lambda f: {"path": (np.savez(f / "ab.npz", a=VALUES, b=VALUES), str(f / "ab.npz"))[1]},
        "holds the arrays a, b: choose one with --data.key",
    ),
    "name in npy": (lambda f: {"path": written(f, "npy"), "vector": "t"}, "a .npy file holds one array without a name"),
    "length": (lambda f: {"path": written(f, "npz", t=T[:9]), "vector": "t"}, "and t has the shape [9]"),
    "field": (lambda f: {"path": written(f, "npz", m=T), "field": "m"}, "--data.field m: has the shape [50]; give [N"),
    "label": (lambda f: {"path": written(f, "npz", t=T), "label": "t"}, "--data.label t: holds float64 [50]"),
    "negative": (lambda f: {"path": written(f, "npz", k=KINDS - 1), "label": "k"}, "classes are numbered from 0"),
    "val shape": (other_shape, "holds fields of shape [1, 4, 6] and --data.path"),
    "std": (lambda f: {"path": written(f, "npy"), "std": [1.0]}, "--data.std has 1 numbers for 2 channels"),
    "zero": (lambda f: {"path": written(f, "npy"), "mean": [0.0, 0.0], "std": [1.0, 0.0]}, "must be a positive number"),
    "fraction": (lambda f: {"path": written(f, "npy"), "val_fraction": 1.0}, "--data.val_fraction 1 must lie between"),
    "fractions": (
        lambda f: {"path": written(f, "npy"), "val_fraction": 0.5, "test_fraction": 0.5},
        "which take the rest, 25 and 25; give more, or lower --data.val_fraction",
    ),
    "no path": (lambda _: {}, "--data.path is missing: name the file"),
    "folder": (lambda f: {"path": str((f / "a.npy").mkdir() or f / "a.npy")}, "a.npy is no regular file"),
    "pipe": (pipe("a.npy"), "a.npy is no regular file"),
    "h5 pipe": (pipe("a.h5"), "a.h5 is no regular file"),
    "zarr file": (lambda f: {"path": str((f / "a.zarr").touch() or f / "a.zarr")}, "a.zarr is no folder"),
    "cut npy": (changed("npy", lambda b: b[:-9]), "is cut short: it holds 9,591 bytes of 9,600"),
    "npy of 5 GB": (changed("npy", lambda b: b.replace(b"(50, 2,", b"(50000000, 2,")), "is cut short: it holds"),
    "half a header": (changed("npy", lambda b: b[:40]), "cannot be read: EOF: reading array header"),
    "empty": (changed("npy", lambda _: b""), "it does not begin as a .npy array does"),
    "version": (changed("npy", lambda b: b[:6] + b"\x09" + b[7:]), "it is of version 9.0 of .npy, which nobody knows"),
    "npz called npy": (changed("npy", lambda b: b"PK" + b[2:]), "it does not begin as a .npy array does"),
    "spoilt npz": (changed("compressed npz", spoilt), "cannot be read: "),
    "encrypted": (changed("npz", encrypted), "is encrypted"),
    "pickled": (pickled, "holds object and no real numbers"),
    "big": (saved(np.concatenate([VALUES[:7].astype(float), np.full((2, 2, 4, 6), 1e300)])), "row 7: holds a number"),
    "group": (hdf5(lambda file: file.create_group("fields"), key="fields"), "--data.key fields: "),
    "no arrays": (hdf5(lambda file: file.create_group("fields")), "holds no array: give another file"),
    "null": (hdf5(lambda file: file.create_dataset("fields", data=h5py.Empty("f4"))), "cannot be read: it is empty"),
    "scalar": (hdf5(lambda file: file.create_dataset("fields", data=1.0)), "holds an array of shape []"),
    "no zarr": (lambda f: zarr_without(f, None), "bad.zarr cannot be read: No group found"),
    "spoilt zarr": (lambda f: zarr_without(f, b"junk"), "bad.zarr cannot be read: "),
    "key of one": (
        lambda f: {"path": (zarr.save(str(f / "a.zarr"), VALUES), str(f / "a.zarr"))[1], "key": "x"},
        "holds one array without a name",
    ),
    "large label": (
        lambda f: {"path": written(f, "npz", k=KINDS * 10**9), "label": "k"},
        "--data.label k: holds 2000000000; classes are 0..49, numbered without gaps",
    ),
    "no numbers": (lambda f: {"path": written(f, "npz", t=np.zeros((50, 0))), "vector": "t"}, "--data.vector t: has"),
    "val class": (two_files({"k": KINDS}, {"k": KINDS + 1}, label="k"), "val.npz: holds 3; classes are 0..2, numbered"),
    "val vector": (two_files({"t": T}, {"t": np.ones((50, 2))}, vector="t"), "t has the size 2, and in --data.path"),
    "val field": (
        two_files({"m": VALUES}, {"m": VALUES[:, :1]}, field="m"),
        "val.npz: m has the size 1, and in --data.path",
    ),
    "val space": (two_files({"m": VALUES}, {"m": VALUES[..., :2]}, field="m"), "val.npz: has the shape [50, 2, 4, 2]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    make, words = BAD[case]
    with pytest.raises(InputError) as error:
        data = Fields(**make(tmp_path))
        Standardized(**data.scale)
        for name in ("train", "val", "test"):
            data.split(name)  # type: ignore[arg-type]
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_a_channel_that_never_changes_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = VALUES.copy()
    values[:, 1] = 0.1  # no whole number of binary digits: its standard deviation is not 0 to rounding
    np.save(tmp_path / "a.npy", values)
    scale = Fields(str(tmp_path / "a.npy")).scale
    assert (scale["mean"][1], scale["std"][1]) == (float(np.float32(0.1)), 1.0)
    assert capsys.readouterr().err == f"{tmp_path}/a.npy: channel 1 never changes, and gets std 1\n"


SMALL = ["--model.network.width=8", "--model.network.blocks=1", "--model.schedule.T=6", "--trainer.max_steps=3"]


def fit(folder: Path, path: str, *options: str) -> Run:
    run = Run(folder / "run")
    args = ["fit", f"-c={ROOT}/configs/fields.yaml", f"--data.path={path}", f"--run_dir={run.folder}", *SMALL]
    main([*args, "--data.batch_size=8", *options])
    return run


def test_a_run_gives_samples_and_densities_in_the_units_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path, written(tmp_path, "npy"))
    assert read(run.config_path)["data"]["init_args"]["std"][1] == pytest.approx(float(VALUES[:, 1].std()), rel=0.1)
    main(["test", str(run.folder)])
    report = json.loads((run.folder / "bound-test.json").read_text())
    constant = -(24 * sum(math.log(std) for std in read(run.config_path)["data"]["init_args"]["std"]))
    assert report["density_nats_in_data_units"] == pytest.approx(constant)
    assert f"add {-constant / 48 / math.log(2):.5f} bits/dim for the units of the data" in capsys.readouterr().out
    main(["sample", str(run.folder), "--n=6"])
    drawn = load_file(run.folder / "samples.safetensors")["images"]
    assert drawn.shape == (6, 2, 4, 6) and drawn.dtype == torch.float32
    # hardly trained: noise with the mean and the spread of each channel, at least roughly
    assert 5 < float(drawn[:, 1].std() / drawn[:, 0].std()) < 20
    # another file, whose own scale is another: the run's counts
    np.save(tmp_path / "my.npy", VALUES * 100)
    assert Run(run.folder).load_data().scale["std"] == read(run.config_path)["data"]["init_args"]["std"]  # type: ignore[attr-defined]
    for words, given in {
        "this measures pictures of grey levels": ["evaluate", "ood", str(run.folder)],
        "--known and --mask are pictures": ["sample", str(run.folder), "--known=a.png", "--mask=b.png"],
    }.items():
        assert words in refused(capsys, *given)


def test_what_measures_a_run_of_fields_knows_its_condition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--data.vector=t", "--model.vector_conditional=true", "--model.label_dropout=0.1"]
    run = fit(tmp_path, written(tmp_path, "npz", t=T), *told)
    main(["evaluate", "forms", str(run.folder), "--images=4", "--draws=2"])
    assert "bits/dim for the units of the data" in capsys.readouterr().out
    # draw k of the forms is the bound from eval_seed k
    module, batch = run.load_module(), run.load_data().split("test").batch(torch.arange(4))  # type: ignore[attr-defined]
    found = json.loads((run.folder / "forms" / "forms.json").read_text())[0]
    draws = []
    for module.eval_seed in (0, 1):
        with torch.no_grad():
            draws.append(module.bound(module.bounds["test"][0], batch)["elbo"].mean())
    assert found["form"] == "denoising" and found["elbo_nats"] == pytest.approx(float(sum(draws) / 2), rel=1e-5)
    main(["evaluate", "variance", str(run.folder), "--images=8", "--points=3"])
    assert (run.folder / "variance" / "analytic.yaml").is_file()
    main(["export", str(run.folder), "--to=safetensors", f"--out={tmp_path}/m.safetensors"])
    scale = read(run.config_path)["data"]["init_args"]
    printed = f"values of the data are std x + mean, mean {scale['mean']}, std {scale['std']}"
    assert printed in capsys.readouterr().out
    for command, words in (
        ("evaluate quality RUN", "this measures pictures of grey levels, and the model is one of fields"),
        ("evaluate ood RUN", "this measures pictures of grey levels, and the model is one of fields"),
        ("evaluate flow RUN --dequantization uniform", "this measures pictures of grey levels"),
        ("export RUN --to diffusers --out FOLDER", "know of classes only, and this model is told a vector"),
    ):
        names = {"RUN": str(run.folder), "FOLDER": f"{tmp_path}/diffusers"}
        assert words in refused(capsys, *(names.get(word, word) for word in command.split()))
    assert not (tmp_path / "diffusers").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.clip_x0=true"], "--model.clip_x0 true clips x0 to [-1, 1], and fields go further"),
        (
            ["--model.decoder=DiscretizedGaussian"],
            "DiscretizedGaussian is for grey levels, and fields have none: use PlainGaussian",
        ),
        (["--model.vector_conditional=true"], "the data have no vector; name one with --data.vector"),
        (["--model.network.multipliers=[1,1,1,1]"], "is not divisible by 8"),
        (["--model.class_conditional=true"], "the data have no classes (num_classes is null); of fields name their"),
        (["--data.std=one"], "--data.std one cannot be read as list[float] or null"),
        (["--data.split_seed=0.5"], "--data.split_seed 0.5 cannot be read as int"),
        (["--model.network.padding=periodic"], "--model.network.padding periodic cannot be read as zeros or circular"),
    ],
)
def test_what_does_not_fit_fields_is_refused(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [f"-c={ROOT}/configs/fields.yaml", f"--data.path={written(tmp_path, 'npy')}", f"--run_dir={tmp_path}/run"]
    assert words in refused(capsys, "fit", *args, *options)


_RSS = """
import resource, sys
from ddpm_lightning.cli import main
limit = int(sys.argv[1])
main(sys.argv[2:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("PEAK", before)
"""


def test_a_file_larger_than_the_limit_is_never_in_memory(tmp_path: Path) -> None:
    """1 GB that takes no room on the disk: the peak of memory is that of a small file, to within 250 MB."""
    peaks = []
    for rows in (2_000, 61_000):
        path = tmp_path / f"{rows}.npy"
        header = np.lib.format.header_data_from_array_1_0(np.empty((0, 1, 64, 64), np.float32))
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows, 1, 64, 64)})
            file.truncate(file.tell() + rows * 64 * 64 * 4)
        args = ["fit", f"-c={ROOT}/configs/fields.yaml", f"--data.path={path}", f"--run_dir={tmp_path}/{rows}", *SMALL]
        args += ["--data.batch_size=8", "--data.memory_gb=0.001", "--data.limit_val=8", "--trainer.limit_val_batches=1"]
        done = subprocess.run(
            [sys.executable, "-c", _RSS, "0", *args], capture_output=True, text=True, check=False, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split("PEAK")[1]) / 1e3)
        path.unlink()
    assert peaks[1] < peaks[0] + 250, peaks


@pytest.mark.parametrize(("space", "picture"), [((40,), (32, 40)), ((6, 10), (6, 10)), ((4, 6, 10), (6, 10))])
def test_fields_are_shown(space: tuple[int, ...], picture: tuple[int, int]) -> None:
    fields = torch.linspace(-5, 5, math.prod(space)).double().reshape(1, 1, *space).expand(3, 2, *space)
    grey = fields_in_grey(fields)
    assert (
        grey.shape == (3, 2, *picture) and grey.dtype == torch.uint8 and (int(grey.min()), int(grey.max())) == (0, 255)
    )
    assert tile(fields, None).shape[0] == 3
    if len(space) == 1:
        # one line that rises from the lower left to the upper right
        top = grey[0, 0].argmax(0)
        assert (int(top[0]), int(top[-1])) == (30, 0) and bool((top.diff() <= 0).all())
