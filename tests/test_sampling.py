"""``ddpm sample``: what it draws, the files that it writes and reads, and what it refuses."""

import gc
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import build, conditional
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.figures import tile
from ddpm_lightning.progress import progress
from ddpm_lightning.samplers import (
    AncestralSampler,
    DDIMSampler,
    DPMSolverSampler,
    HeunSampler,
    MomentMatchingSampler,
    Sampler,
)
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.sampling.known import read_images, read_mask
from ddpm_lightning.sampling.output import ImageFile
from ddpm_lightning.sampling.request import slerp
from ddpm_lightning.schedules import KarrasGrid, LinearChain, LogSNRGrid, VarianceExploding
from ddpm_lightning.trainer import DiffusionTrainer
from ddpm_lightning.training import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore:.*infer the batch indices.*", "ignore:.*does not have many workers.*")


def trainer(folder: Path, **options: object) -> DiffusionTrainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return DiffusionTrainer(default_root_dir=folder, accelerator="cpu", **quiet, **options)


def randomized(module: DiffusionModule) -> DiffusionModule:
    """Weights that make every condition matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.ema_model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return module


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DiffusionModule, Path]]:
    """A module without classes and one with, and their checkpoints."""
    made = {"plain": randomized(build()), "classes": randomized(conditional(label_dropout=0.1))}
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, module in made.items():
        torch.save({"state_dict": module.state_dict(), "global_step": 1}, folder / f"{name}.ckpt")
    return {name: (module, folder / f"{name}.ckpt") for name, module in made.items()}


LOCK = ".samples.lock"
Modules = dict[str, tuple[DiffusionModule, Path]]


def drawn(modules: Modules, folder: Path, name: str = "plain", **options: object) -> Tensor:
    """The images that ``sample`` writes."""
    module, checkpoint = modules[name]
    trainer(folder).sample(module, ckpt_path=str(checkpoint), out=str(folder), **{"steps": 4, **options})
    return load_file(folder / "samples.safetensors")["images"]


def settings(folder: Path) -> dict:
    with safe_open(folder / "samples.safetensors", "pt") as file:
        return json.loads(file.metadata()["settings"])


# ---------------------------------------------------------------- images


CASES: list[tuple[str, dict]] = [
    ("plain", {"sampler": AncestralSampler()}),
    ("plain", {"sampler": DPMSolverSampler(2, sde=True), "grid": LogSNRGrid()}),
    ("plain", {"sampler": HeunSampler(), "grid": KarrasGrid()}),
    ("classes", {"sampler": AncestralSampler(), "guidance_scale": 3.0}),
    ("classes", {"sampler": DPMSolverSampler(2, sde=True), "guidance_scale": 3.0, "labels": [7, 1]}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_image_k_is_the_same_in_any_batch_and_number(
    modules: Modules, tmp_path: Path, name: str, options: dict
) -> None:
    whole = drawn(modules, tmp_path / "a", name, n=9, seed=5, **options)
    assert torch.equal(drawn(modules, tmp_path / "b", name, n=5, seed=5, batch_size=2, **options), whole[:5])
    assert not torch.equal(drawn(modules, tmp_path / "c", name, n=5, seed=6, **options), whole[:5])
    with torch.inference_mode():
        assert torch.equal(SampleRequest(steps=4, seed=5, **options).on(modules[name][0])(range(9)), whole)


def test_labels_are_taken_in_turn(modules: Modules, tmp_path: Path) -> None:
    drawn(modules, tmp_path / "all", "classes", n=12)
    chosen = drawn(modules, tmp_path / "some", "classes", n=5, labels=[3, 8, 10])
    labels = [load_file(tmp_path / name / "samples.safetensors")["labels"].tolist() for name in ("all", "some")]
    assert labels == [[*range(10), 0, 1], [3, 8, 10, 3, 8]]
    threes = drawn(modules, tmp_path / "three", "classes", n=5, labels=[3])
    assert torch.equal(threes[[0, 3]], chosen[[0, 3]]) and not torch.equal(threes, chosen)
    drawn(modules, tmp_path / "plain", n=2)
    assert set(load_file(tmp_path / "plain" / "samples.safetensors")) == {"images"}


DETERMINISTIC = [DDIMSampler(), DPMSolverSampler(), HeunSampler()]


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_rows_between_two_seeds_end_in_the_images_of_these_seeds(
    modules: Modules, tmp_path: Path, sampler: Sampler
) -> None:
    options = {"n": 3, "sampler": sampler, "labels": [4, 9]}
    rows = drawn(modules, tmp_path / "rows", "classes", seed=1, interpolate_to=2, interpolation_columns=5, **options)
    first, second = (drawn(modules, tmp_path / str(seed), "classes", seed=seed, **options) for seed in (1, 2))
    rows = rows.unflatten(0, (3, 5))
    assert torch.equal(rows[:, 0], first) and torch.equal(rows[:, -1], second)
    assert all(not torch.equal(rows[:, i], rows[:, i + 1]) for i in range(4))
    file = load_file(tmp_path / "rows" / "samples.safetensors")
    assert file["labels"].tolist() == [4] * 5 + [9] * 5 + [4] * 5
    with Image.open(tmp_path / "rows" / "samples.png") as picture:
        assert picture.size == (5 * 34 + 2, 3 * 34 + 2)


def test_slerp() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 40, 40, generator=generator) for _ in range(2))
    fractions = [torch.full((2,), f) for f in (0.0, 0.5, 1.0)]
    start, half, end = (slerp(a, b, f) for f in fractions)
    assert torch.equal(start, a) and torch.equal(end, b)
    # orthogonal up to chance, of equal length up to chance: a circle is cos, sin
    assert torch.allclose(half, (a + b) / 2**0.5, atol=0.1)
    assert half.double().flatten(1).norm(dim=1).tolist() == pytest.approx([4800**0.5] * 2, rel=0.05)
    u, v = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    expected = torch.tensor([[np.cos(np.pi / 8), np.sin(np.pi / 8)]], dtype=torch.float32)
    assert torch.allclose(slerp(u, v, torch.tensor([0.25])), expected)
    assert torch.equal(slerp(a, a, fractions[1]), a)


def test_grids_and_settings_are_written(modules: Modules, tmp_path: Path) -> None:
    # more steps than the chain has: only a grid that leaves its states can
    drawn(modules, tmp_path, n=2, seed=9, steps=15, grid=KarrasGrid(5.0), sampler=DDIMSampler(0.5))
    told = settings(tmp_path)
    assert told["grid"] == {"class_path": "ddpm_lightning.schedules.grids.KarrasGrid", "init_args": {"rho": 5.0}}
    assert told["sampler"]["init_args"] == {"eta": 0.5}
    assert (told["n"], told["seed"], told["steps"], told["labels"]) == (2, 9, 15, None)


# ---------------------------------------------------------------- inpainting


@pytest.fixture
def pixels(tmp_path: Path) -> tuple[str, str]:
    """A known image, 17 levels shown as 0..255, and a mask of its left half."""
    image = (torch.arange(64).reshape(8, 8) % 17).double().mul(255 / 16).round().to(torch.uint8)
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[:, :4] = 255
    for name, values in (("known", image), ("mask", mask)):
        Image.fromarray(values.numpy()).save(tmp_path / f"{name}.png")
    return str(tmp_path / "known.png"), str(tmp_path / "mask.png")


@pytest.mark.parametrize("inpainting", [None, MomentMatchingSampler])
def test_known_pixels_are_kept_and_the_rest_is_drawn(
    modules: Modules, tmp_path: Path, pixels: tuple[str, str], inpainting: type | None
) -> None:
    known, mask = pixels
    options = {"n": 3, "seed": 2, "known": known, "mask": mask, "inpainting": inpainting}
    whole = drawn(modules, tmp_path / "a", **options)
    assert torch.equal(whole[..., :4], (torch.arange(64).reshape(8, 8) % 17)[:, :4].expand(3, 1, 8, 4).to(torch.uint8))
    plain = drawn(modules, tmp_path / "b", n=3, seed=2)
    assert not torch.equal(whole[..., 4:], plain[..., 4:]) and not torch.equal(whole[0], whole[1])
    assert torch.equal(drawn(modules, tmp_path / "c", batch_size=2, **options), whole)
    name = "MomentMatchingSampler" if inpainting else "ReplacementSampler"
    assert settings(tmp_path / "a")["inpainting"]["class_path"].endswith(name)


def test_known_images_and_masks_of_each_image(modules: Modules, tmp_path: Path) -> None:
    images = drawn(modules, tmp_path / "known", n=5)
    masks = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    save_file({"mask": masks}, tmp_path / "mask.safetensors")
    np.savez(tmp_path / "mask.npz", mask=masks.numpy())
    known = str(tmp_path / "known" / "samples.safetensors")
    made = [
        drawn(modules, tmp_path / kind, n=5, seed=3, known=known, mask=str(tmp_path / f"mask.{kind}"), batch_size=2)
        for kind in ("safetensors", "npz")
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0][masks], images[masks]) and not torch.equal(made[0][~masks], images[~masks])


def test_pictures_and_arrays_that_are_read(tmp_path: Path) -> None:
    colours = torch.randint(0, 256, (5, 4, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    Image.fromarray(colours.numpy()).save(tmp_path / "colours.png")
    assert torch.equal(read_images(tmp_path / "colours.png", 2, (3, 5, 4), 256)[0], colours.permute(2, 0, 1))
    Image.fromarray(np.array([[255, 0], [0, 255], [0, 0]], dtype=np.uint8)).convert("1").save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", 2, (3, 3, 2)).tolist() == [[[[True, False], [False, True], [False, False]]]]
    np.savez(tmp_path / "mask.npz", mask=np.eye(3, 2, dtype=bool))
    assert read_mask(tmp_path / "mask.npz", 2, (3, 3, 2)).shape == (1, 1, 3, 2)


# ---------------------------------------------------------------- files


def test_a_file_that_is_filled_in_any_order_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (7, 3, 2, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels, metadata = torch.arange(7) * 3, {"seed": "4", "settings": "{}"}
    writers = [ImageFile(tmp_path / "a.safetensors", 7, (3, 2, 5), True, metadata) for _ in range(2)]
    writers[0].create()
    # as two processes do
    for writer, rows in zip(writers, ([6, 0, 2, 4], [5, 1, 3]), strict=True):
        index = torch.tensor(rows)
        writer.write(index[:2], images[index[:2]], labels[index[:2]])
        writer.write(index[2:], images[index[2:]], labels[index[2:]])
    assert [writer.written for writer in writers] == [4, 3] and not (tmp_path / "a.safetensors").exists()
    writers[0].finish()
    assert (tmp_path / "a.safetensors").stat().st_size == writers[0].size and len(list(tmp_path.iterdir())) == 1
    save_file({"images": images, "labels": labels}, tmp_path / "b.safetensors", metadata=metadata)
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == metadata
    (length,) = struct.unpack("<Q", (tmp_path / "a.safetensors").read_bytes()[:8])
    assert length % 8 == 0


def test_npz_is_the_same(modules: Modules, tmp_path: Path) -> None:
    images = drawn(modules, tmp_path / "a", "classes", n=7)
    module, checkpoint = modules["classes"]
    trainer(tmp_path).sample(module, ckpt_path=str(checkpoint), steps=4, n=7, out=f"{tmp_path}/b", format="npz")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"samples.npz", "samples.png", LOCK}
    with np.load(tmp_path / "b" / "samples.npz") as arrays:
        assert np.array_equal(arrays["images"], images.numpy()) and arrays["labels"].tolist() == [*range(7)]
        assert json.loads(str(arrays["settings"]))["n"] == 7 and str(arrays["seed"]) == "0"
    assert torch.equal(read_images(tmp_path / "b" / "samples.npz", 7, (1, 8, 8), 17), images)


def test_an_interrupted_sampling_leaves_no_file_that_looks_complete(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ImageFile.write

    def failing(file: ImageFile, index: Tensor, *parts: Tensor | None) -> None:
        if int(index[0]) > 0:
            raise RuntimeError("interrupted")
        write(file, index, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFile, "write", failing)
        with pytest.raises(RuntimeError, match="interrupted"):
            drawn(modules, tmp_path, n=4, batch_size=2)
    assert {path.name for path in tmp_path.iterdir()} == {"samples.safetensors.partial", LOCK}
    assert drawn(modules, tmp_path, n=3).shape[0] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"samples.safetensors", "samples.png", LOCK}
    module, checkpoint = modules["plain"]
    with pytest.raises(InputError, match="2 of 4 images were drawn"):
        trainer(tmp_path, limit_predict_batches=1).sample(
            module, ckpt_path=str(checkpoint), out=f"{tmp_path}/few", n=4, batch_size=2, steps=1
        )
    assert not (tmp_path / "few" / "samples.safetensors").exists()


def test_memory_does_not_grow_with_the_number_of_images(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, alive = ImageFile.write, list[int]()  # at the last batch

    def watched(file: ImageFile, *parts: Tensor | None) -> None:
        write(file, *parts)
        if file.written < file.n:
            return
        tensors = [o for o in gc.get_objects() if type(o) is Tensor]
        alive.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    monkeypatch.setattr(ImageFile, "write", watched)
    for n in (64, 1600):
        drawn(modules, tmp_path, n=n, steps=1)
    # a label or an index kept for each image would be 12 kB
    assert len(alive) == 2 and alive[1] - alive[0] < 4_000


def test_only_the_first_images_are_shown(modules: Modules, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn(modules, tmp_path, n=9, grid_images=4)
    assert (
        f"9 images in {tmp_path}/samples.safetensors; the first 4 in {tmp_path}/samples.png" in capsys.readouterr().out
    )
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (2 * 34 + 2, 2 * 34 + 2)
    drawn(modules, tmp_path, n=4, grid_images=4)
    assert "; all of them in " in capsys.readouterr().out


# ---------------------------------------------------------------- what stands in the way


def test_of_two_samplings_into_one_folder_the_second_is_refused(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = drawn(modules, tmp_path / "alone", n=4, seed=1)
    write, refusals = ImageFile.write, list[str]()

    def meanwhile(file: ImageFile, index: Tensor, *parts: Tensor | None) -> None:
        write(file, index, *parts)
        if int(index[0]) == 0:
            with pytest.raises(InputError) as refusal:
                drawn(modules, tmp_path / "a", n=4, seed=2)
            refusals.append(str(refusal.value))

    monkeypatch.setattr(ImageFile, "write", meanwhile)
    assert torch.equal(drawn(modules, tmp_path / "a", n=4, seed=1, batch_size=2), expected)
    assert settings(tmp_path / "a")["seed"] == 1
    assert len(refusals) == 1 and f"process {os.getpid()} on " in refusals[0]
    assert re.fullmatch(rf"{tmp_path}/a is being sampled into by another process \(.*\): wait for it, .*", refusals[0])
    monkeypatch.undo()
    assert not torch.equal(drawn(modules, tmp_path / "a", n=4, seed=2), expected)


NAMES = ["samples.safetensors.partial", "samples.safetensors", "samples.png", "samples.gif"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["symlink", "hard link", "dangling", "link to a folder", "FIFO"])
def test_links_and_pipes_are_replaced_and_what_they_lead_to_is_left_alone(
    modules: Modules, tmp_path: Path, name: str, kind: str
) -> None:
    path, other = tmp_path / "a" / name, tmp_path / "other"
    path.parent.mkdir()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "link to a folder":
        other.mkdir()
        path.symlink_to(other)
    else:
        if kind != "dangling":
            other.write_text("precious")
        (path.hardlink_to if kind == "hard link" else path.symlink_to)(other)
    assert len(drawn(modules, tmp_path / "a", n=2, steps=1, gif=True)) == 2
    written = {path.name: path for path in (tmp_path / "a").iterdir()}
    assert set(written) == {*NAMES[1:], LOCK} and all(file.is_file() for file in written.values())
    assert not any(file.is_symlink() for file in written.values())
    assert not other.exists() if kind in ("dangling", "FIFO") else other.is_dir() or other.read_text() == "precious"


@pytest.mark.parametrize("name", [*NAMES, LOCK])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_drawn(
    modules: Modules, tmp_path: Path, name: str
) -> None:
    (tmp_path / name / "precious").mkdir(parents=True)
    with pytest.raises(InputError, match=rf"{name} .*: remove it") as refusal:
        drawn(modules, tmp_path, n=2, gif=True)
    assert len(str(refusal.value).splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {name, LOCK} and (tmp_path / name / "precious").is_dir()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.with_name("other"))])
def test_a_lock_that_is_no_file_is_refused(modules: Modules, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / LOCK)
    with pytest.raises(InputError, match=rf"{LOCK} .*: remove it"):
        drawn(modules, tmp_path, n=1)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_the_home_folder_is_that_of_the_user(modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    module, checkpoint = modules["plain"]
    trainer(tmp_path).sample(module, ckpt_path=str(checkpoint), n=1, steps=1, out="~/images")
    assert (tmp_path / "images" / "samples.safetensors").is_file()


# ---------------------------------------------------------------- animation


@pytest.mark.parametrize(("steps", "frames"), [(3, 4), (10, 11), (50, 31)])
def test_animation_ends_with_the_images(modules: Modules, tmp_path: Path, steps: int, frames: int) -> None:
    images = drawn(
        modules, tmp_path, n=9, steps=steps, grid=LogSNRGrid(), gif=True, grid_images=4, batch_size=3,
        sampler=DDIMSampler(),
    )  # fmt: skip
    with Image.open(tmp_path / "samples.gif") as film, Image.open(tmp_path / "samples.png") as picture:
        assert film.n_frames == frames and film.size == picture.size and film.info["loop"] == 0
        first = np.array(film.convert("RGB"))
        film.seek(frames - 1)
        last = torch.from_numpy(np.array(film.convert("RGB"))).permute(2, 0, 1)
        assert film.info["duration"] == 2000
    # levels of the data, and 0..255 of model range: to the nearest
    expected = tile(images[:4], 17)
    assert int((last.int() - expected.int()).abs().max()) <= 1
    x_T = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    shown = tile(((x_T.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), 256)
    assert np.array_equal(first, shown.permute(1, 2, 0).numpy())


def test_an_exploding_schedule_is_shown_in_units_of_the_data(tmp_path: Path) -> None:
    module = build(schedule=VarianceExploding(LinearChain(T=10, beta_start=0.02, beta_end=0.5)))
    torch.save({"state_dict": module.state_dict(), "global_step": 1}, tmp_path / "a.ckpt")
    drawn({"plain": (module, tmp_path / "a.ckpt")}, tmp_path, n=64, gif=True, sampler=DDIMSampler())
    with Image.open(tmp_path / "samples.gif") as film:
        values = np.array(film.convert("L"))
    # N(0, 1) lies inside (-1, 1) with probability 0.68; the pixels between the images are grey too
    assert 0.6 < ((values > 0) & (values < 255)).mean() < 0.85


# ---------------------------------------------------------------- progress


def test_progress_in_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress("sampling", 80, "steps") as bar:
        for second in (5, 19, 20, 30, 41):
            now[0] = second
            bar.update(8)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    # 24 of 80 steps in 20 s
    assert "24/80 [00:20<00:46" in lines[0] and "40/80" in lines[1] and len(lines) == 2, lines


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plain", {"n": 0}, "--n 0 must be 1 or more"),
        ("plain", {"grid_images": 0}, "--grid_images 0 must be 1 or more"),
        ("plain", {"steps": 11}, "--steps 11: steps = 11 must lie between 1 and the chain's T = 10"),
        ("plain", {"steps": 0, "grid": KarrasGrid()}, "--steps 0: steps = 0 must be 1 or more"),
        ("plain", {"labels": [1]}, r"--labels \[1\]: this model is not class-conditional"),
        ("classes", {"labels": [11]}, r"--labels \[11\]: classes must lie between 0 and 9, or be 10 for no class"),
        ("classes", {"labels": []}, r"--labels \[\]"),
        ("plain", {"guidance_scale": 2.0}, "needs a class-conditional model"),
        ("plain", {"interpolate_to": 1}, "--interpolate_to needs a sampler that draws no noise.*AncestralSampler"),
        ("plain", {"interpolate_to": 0, "sampler": DDIMSampler()}, "--interpolate_to 0 is --seed itself"),
        (
            "plain",
            {"interpolate_to": 1, "sampler": DDIMSampler(), "interpolation_columns": 1},
            "--interpolation_columns 1 must be 2 or more",
        ),
        ("plain", {"mask": "mask.png"}, "inpainting needs --known FILE too"),
        ("plain", {"known": "known.png"}, "inpainting needs --mask FILE too"),
        ("plain", {"inpainting": MomentMatchingSampler}, "inpainting needs --known FILE and --mask FILE too"),
        ("plain", {"known": "known.png", "mask": "absent.png"}, "--mask absent.png cannot be read: No such file"),
        ("plain", {"known": "text.png", "mask": "mask.png"}, "--known text.png cannot be read: it is no picture"),
        ("plain", {"known": "text.npz", "mask": "mask.png"}, "--known text.npz cannot be read: File is not a zip"),
        ("plain", {"known": "text.safetensors", "mask": "mask.png"}, "--known text.safetensors cannot be read"),
        ("plain", {"known": "wide.png", "mask": "mask.png"}, r"--known wide.png .*\[1, 8, 9\].*are \[1, 8, 8\]"),
        ("plain", {"known": "colour.npz", "mask": "mask.png"}, r"--known colour.npz .*\[3, 8, 8\]"),
        ("plain", {"known": "bright.npz", "mask": "mask.png"}, r"--known bright.npz: images must be uint8 .* 0..16"),
        ("plain", {"known": "two.npz", "mask": "mask.png", "n": 3}, "--known two.npz is for 2 images.*--n, which is 3"),
        ("plain", {"known": "known.png", "mask": "known.png"}, "--mask known.png must be black and white"),
        ("plain", {"known": "known.png", "mask": "tall.png"}, r"--mask tall.png .*\[1, 9, 8\].*are \[1, 8, 8\]"),
        ("plain", {"known": "known.png", "mask": "float.npz"}, "--mask float.npz: mask must be bool"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for suffix in ("png", "npz", "safetensors"):
        Path(f"text.{suffix}").write_text("no picture")
    grey = np.full((8, 9), 100, dtype=np.uint8)
    for file, values in (("known", grey[:, :8]), ("wide", grey), ("mask", np.zeros((8, 8), dtype=np.uint8))):
        Image.fromarray(values).save(f"{file}.png")
    Image.fromarray(np.zeros((9, 8), dtype=np.uint8)).save("tall.png")
    for file, shape, level in (("two", (2, 1, 8, 8), 16), ("colour", (1, 3, 8, 8), 0), ("bright", (1, 1, 8, 8), 17)):
        np.savez(f"{file}.npz", images=np.full(shape, level, dtype=np.uint8))
    np.savez("float.npz", mask=np.ones((8, 8)))
    with pytest.raises(InputError, match=message) as refusal:
        trainer(tmp_path).sample(modules[name][0], ckpt_path="absent.ckpt", out="out", **options)
    assert len(str(refusal.value).splitlines()) == 1 and not Path("out").exists()


def test_a_disk_without_room(modules: Modules, tmp_path: Path) -> None:
    module, checkpoint = modules["plain"]
    with pytest.raises(InputError, match=r"--n 10{15} images take 6.4e\+07 GB and --out .* GB free"):
        trainer(tmp_path).sample(module, ckpt_path=str(checkpoint), n=10**15, out=str(tmp_path / "a"))
    assert not list((tmp_path / "a").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out .* cannot be written to"):
        trainer(tmp_path).sample(module, ckpt_path=str(checkpoint), out=str(tmp_path / "file" / "a"))
