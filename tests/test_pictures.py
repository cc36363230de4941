"""Folders of pictures: layouts, splits, sizes and colours, what is refused, and a run from end to end."""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from builders import refused
from conftest import ROOT, run_ddpm
from picture_files import pixels, save
from PIL import Image
from safetensors.torch import load_file

from ddpm_lightning.data import Images, images
from ddpm_lightning.errors import InputError


def folder(root: Path, layout: dict[str, int], **shape: int) -> Path:
    """So many pictures in each folder, all different."""
    seed = 0
    for name, count in layout.items():
        for number in range(count):
            seed += 1
            save(root / name / f"{number:02}.png", pixels(seed, **shape))
    return root


def chw(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.reshape(*values.shape[:2], -1)).permute(2, 0, 1)


def everything(data: Images) -> dict[str, list[tuple[bytes, int]]]:
    """The pictures of each split with their classes."""
    data.setup()
    splits = {name: data.split(name) for name in ("train", "val", "test")}
    return {
        name: [(image.numpy().tobytes(), int(label)) for image, label in zip(split.images, split.labels, strict=True)]
        for name, split in splits.items()
    }


# layouts and splits


def test_a_folder_without_subfolders_is_one_class(tmp_path: Path) -> None:
    data = Images(str(folder(tmp_path / "photos", {"": 20}, height=6, width=10)))
    assert (data.shape, data.levels, data.num_classes, data.classes) == ((3, 6, 10), 256, 1, ["photos"])
    assert data.sizes == {"train": 16, "val": 2, "test": 2}
    splits = everything(data)
    drawn = [image for split in splits.values() for image, _ in split]
    assert sorted(drawn) == sorted(chw(pixels(seed, 6, 10)).numpy().tobytes() for seed in range(1, 21))
    assert {label for split in splits.values() for _, label in split} == {0}


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder(tmp_path, {"cats": 5, "Birds": 4, "ants/small/red": 6})
    data = Images(str(tmp_path))
    assert data.classes == ["Birds", "ants", "cats"] and data.num_classes == 3
    # the dictionary's order was the order of the seeds
    classes = {chw(pixels(seed)).numpy().tobytes(): 2 if seed <= 5 else 0 if seed <= 9 else 1 for seed in range(1, 16)}
    found = [each for split in everything(data).values() for each in split]
    assert len(found) == 15 and all(classes[image] == label for image, label in found)


def test_splits_in_folders_of_their_own(tmp_path: Path) -> None:
    folder(tmp_path, {"train/a": 3, "train/b": 2, "val/b": 2, "test/a": 1, "test/b": 4})
    data = Images(str(tmp_path))
    assert data.sizes == {"train": 5, "val": 2, "test": 5} and data.classes == ["a", "b"]
    splits = everything(data)
    assert [label for _, label in splits["train"]] == [0, 0, 0, 1, 1]
    assert [label for _, label in splits["val"]] == [1, 1] and [label for _, label in splits["test"]] == [0, 1, 1, 1, 1]
    assert splits["val"][0][0] == chw(pixels(6)).numpy().tobytes()


def test_what_has_no_folder_is_drawn_from_the_training_pictures(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 10, "test": 3})
    data = Images(str(tmp_path), val_fraction=0.3)
    assert data.sizes == {"train": 7, "val": 3, "test": 3}
    splits = everything(data)
    train = {chw(pixels(seed)).numpy().tobytes() for seed in range(1, 11)}
    assert {image for name in ("train", "val") for image, _ in splits[name]} == train


def test_a_draw_depends_on_names_alone(tmp_path: Path) -> None:
    """Not on the place of the folder, the order on the disk, the pixels, or any seed; few move when some are added."""
    first = folder(tmp_path / "one", {"a": 20, "b": 20})
    for path in sorted(first.rglob("*.png"), reverse=True):
        save(tmp_path / "two" / path.relative_to(first), pixels(7))

    def names(root: Path, **options: Any) -> dict[str, list[str]]:
        data = Images(str(root), **options)
        return {name: [path.relative_to(root).as_posix() for path, _ in data._files[name]] for name in data.sizes}

    splits = names(first)
    assert splits == names(tmp_path / "two", seed=5) and len(splits["train"]) == 32
    # pinned: results of different versions are comparable only on the same split
    assert splits["val"] == ["a/01.png", "a/03.png", "b/12.png", "b/16.png"]
    assert splits["test"] == ["a/19.png", "b/03.png", "b/06.png", "b/08.png"]
    folder(first, {"c": 4})
    added = names(first)
    assert len({*splits["train"]} - {*added["train"]}) <= 2
    # more validation pictures, and the same test pictures
    assert names(first, val_fraction=0.3)["test"] == added["test"]


def test_hidden_and_the_systems_files_are_passed_over_and_others_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path, {"a": 3, "b": 2})
    for name in (".DS_Store", "a/._00.png", "a/Thumbs.db", "b/desktop.ini", "__MACOSX/x.png", ".git/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    data = Images(str(tmp_path))
    data.prepare_data()
    assert capsys.readouterr().err == "" and sum(data.sizes.values()) == 5
    for name in ("README", "a/list.txt", "b/more.TXT", "b/photo.heic"):
        (tmp_path / name).write_text("x")
    Images(str(tmp_path)).prepare_data()
    told = f"{tmp_path}: skipped 4 files that are no pictures (2 .txt, 1 without an ending, 1 .heic)\n"
    assert capsys.readouterr().err == told


# pixels


KINDS: dict[str, dict[str, Any]] = {
    "png": {}, "bmp": {}, "tiff": {}, "tif": {"compression": "tiff_lzw"}, "webp": {"lossless": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "channels"),
    # WebP has no grey pictures
    [(suffix, channels) for suffix in KINDS for channels in (1, 3) if (suffix, channels) != ("webp", 1)],
)
def test_kinds_of_files_that_keep_every_level(suffix: str, channels: int, tmp_path: Path) -> None:
    values = [pixels(seed, 5, 7, channels) for seed in range(4)]
    for number, each in enumerate(values):
        save(tmp_path / "train" / f"{number}.{suffix.upper()}", each, **KINDS[suffix])
    folder(tmp_path, {"val": 1, "test": 1}, height=5, width=7, channels=channels)
    data = Images(str(tmp_path))
    assert data.shape == (channels, 5, 7)
    assert torch.equal(data.split("train").images, torch.stack([chw(each) for each in values]))


def test_jpeg_and_gif(tmp_path: Path) -> None:
    flat = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    for suffix in ("jpg", "jpeg", "gif"):
        save(tmp_path / f"{suffix}.{suffix}", flat)
    images = everything(Images(str(tmp_path)))
    for image, _ in (each for split in images.values() for each in split):
        assert np.abs(np.frombuffer(image, np.uint8).reshape(3, 64).T.astype(int) - (200, 100, 50)).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(suffix: str, orientation: int, tmp_path: Path) -> None:
    """A corner of each colour ends where PIL's own function puts it, and the size is the one that is seen."""
    values = np.zeros((16, 32, 3), np.uint8)
    values[:8, :16], values[:8, 16:], values[8:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for number in range(3):
        save(tmp_path / f"{number}.{suffix}", values, exif=exif)
    turns = [
        lambda x: x, lambda x: x[:, ::-1], lambda x: x[::-1, ::-1], lambda x: x[::-1],
        lambda x: x.transpose(1, 0, 2), lambda x: x.transpose(1, 0, 2)[:, ::-1],
        lambda x: x.transpose(1, 0, 2)[::-1, ::-1], lambda x: x.transpose(1, 0, 2)[::-1],
    ]  # fmt: skip
    expected = chw(np.ascontiguousarray(turns[orientation - 1](values))).int()
    data = Images(str(tmp_path))
    assert data.shape == expected.shape
    seen = data.split("train").images[0].int()
    middle = (seen - expected)[:, 2:-2:4, 2:-2:4]  # away from the edges, which JPEG blurs
    assert int(middle.abs().max()) <= 12


@pytest.mark.parametrize(
    ("size", "whole", "rows", "columns"),
    [
        (4, (4, 8), (0, 4), (2, 6)),  # the sides go
        ([8, 4], (8, 16), (0, 8), (6, 10)),
        ([2, 16], (8, 16), (3, 5), (0, 16)),  # above and below go
        ([8, 16], (8, 16), (0, 8), (0, 16)),
        (16, (16, 32), (0, 16), (8, 24)),  # and grows
    ],
)
def test_size(
    size: Any, whole: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int], tmp_path: Path
) -> None:
    """The middle of what PIL makes of the whole picture."""
    folder(tmp_path, {"train": 1, "val": 1, "test": 1}, height=8, width=16)
    data = Images(str(tmp_path), size=size)
    assert data.shape == (3, *(size if isinstance(size, list) else (size, size)))
    resized = chw(np.array(Image.fromarray(pixels(1, 8, 16)).resize(whole[::-1], Image.Resampling.BICUBIC)))
    expected = resized[:, slice(*rows), slice(*columns)]
    assert torch.equal(data.split("train").images[0], expected)


def test_resizing_takes_the_mean_of_what_it_makes_smaller(tmp_path: Path) -> None:
    """Stripes of one pixel become grey, and no moire; and pictures of several sizes come out in one."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    for name, values in (("a", stripes), ("b", stripes[:50]), ("c", stripes[:, :33])):
        save(tmp_path / f"{name}.png", values)
    data = Images(str(tmp_path), size=8)
    data.prepare_data()
    data.setup()
    for name in ("train", "val", "test"):
        inside = data.split(name).images[..., 1:-1].int()
        assert inside.shape == (1, 1, 8, 6) and int((inside - 128).abs().max()) <= 6


def test_colours_are_made_grey_and_grey_pictures_colourful(tmp_path: Path) -> None:
    save(tmp_path / "train/a.png", pixels(1))
    save(tmp_path / "train/b.png", pixels(2, channels=1))
    folder(tmp_path, {"val": 1, "test": 1})
    rgb, grey = (Images(str(tmp_path), channels=c).split("train").images for c in (3, 1))
    assert torch.equal(rgb[0], chw(pixels(1))) and torch.equal(rgb[1], chw(pixels(2, channels=1)).expand(3, 8, 8))
    weighed = (pixels(1) @ np.array([0.299, 0.587, 0.114])).round()
    assert int((grey[0, 0].int() - torch.from_numpy(weighed).int()).abs().max()) <= 1
    assert torch.equal(grey[1], chw(pixels(2, channels=1)))


def test_palettes_and_opaque_alpha_are_pictures(tmp_path: Path) -> None:
    flat = np.full((8, 8, 3), (10, 20, 30), np.uint8)
    Image.fromarray(flat).quantize(4).save(tmp_path / "a.png")
    save(tmp_path / "b.png", np.dstack([flat, np.full((8, 8), 255, np.uint8)]))
    save(tmp_path / "c.png", flat)
    assert {image for split in everything(Images(str(tmp_path))).values() for image, _ in split} == {
        chw(flat).numpy().tobytes()
    }


def test_a_telephones_picture_is_its_first_frame(tmp_path: Path) -> None:
    for name in "abc":
        frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (90, 200)]
        frames[0].save(tmp_path / f"{name}.jpg", format="MPO", save_all=True, append_images=frames[1:])
    image = Images(str(tmp_path)).split("train").images
    assert image.shape == (1, 3, 8, 8) and int((image.int() - 90).abs().max()) <= 1


# what is refused


def cut(path: Path, part: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)


def animated(path: Path) -> None:
    frames = [Image.fromarray(pixels(seed)) for seed in (1, 2)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


# ruff: noqa: E501
Spoil = Callable[[Path], object]
# what is done with a folder of ten pictures and to which file, with what options; and what is said of it
REFUSED: dict[str, tuple[Spoil, dict[str, Any], str]] = {
    "missing": (lambda p: p.rename(p.with_name("elsewhere")), {}, r"--data\.path=\S*/photos does not exist: give the folder"),
    "empty": (lambda p: [each.unlink() for each in p.iterdir()], {}, r"/photos holds no pictures \(\.png, .*\): put them there"),
    "text alone": (lambda p: [each.rename(each.with_suffix(".txt")) for each in p.iterdir()], {}, r"no pictures \(.*\), only \.txt files"),
    "one": (lambda p: [each.unlink() for each in p.iterdir() if each.name != "00.png"], {}, "holds 1 picture, of which 1 for val and 1 for test leave none to train on"),
    "two": (lambda p: [each.unlink() for each in p.iterdir() if each.name > "02"], {}, "holds 2 pictures, of which 1 for val and 1 for test leave none"),
    "fractions": (lambda p: None, {"val_fraction": 0.5, "test_fraction": 0.5}, r"5 for val and 5 for test leave none .* lower --data\.val_fraction and"),
    "loose and in folders": (lambda p: folder(p, {"cats": 2}), {}, r"holds pictures, as 00\.png, and folders of pictures, as cats: a folder is a class"),
    "an empty class": (lambda p: (folder(p, {"a": 9}), [each.unlink() for each in p.glob("*.png")], (p / "b").mkdir()), {}, "/photos/b holds no pictures .*: a folder is a class; fill it or move it away"),
    "val without train": (lambda p: folder(p, {"val": 2}), {}, "has a folder val and no folder train"),
    "pictures beside train": (lambda p: folder(p, {"train": 2}), {}, r"has a folder train, and beside it 00\.png: train, val and test .* are its splits"),
    "an empty val": (lambda p: (folder(p, {"train": 2}), [each.unlink() for each in p.glob("*.png")], (p / "val").mkdir()), {}, "/photos/val holds no pictures"),
    "another class": (lambda p: ([each.unlink() for each in p.iterdir()], folder(p, {"train/a": 3, "test/b": 1})), {}, "/photos/test has a class b and .*/photos/train has none: it has a"),
    "classes in test alone": (lambda p: ([each.unlink() for each in p.iterdir()], folder(p, {"train": 3, "test/b": 1})), {}, "/photos/test has a folder for each class and .*/photos/train has none"),
    "classes in train alone": (lambda p: ([each.unlink() for each in p.iterdir()], folder(p, {"train/a": 3, "test": 1})), {}, "/photos/train has a folder for each class and .*/photos/test has none"),
    "a circle": (lambda p: ([each.unlink() for each in p.iterdir()], (p / "a").mkdir(), (p / "a/b").symlink_to(p / "a")), {}, "/photos/a/b is a link to a folder around it"),
    "sizes": (lambda p: save(p / "04.png", pixels(1, 6, 10)), {}, r"pictures differ in size \(height x width\): \S*/\d\d\.png has 8 x 8 pixels, \S*/04\.png has 6 x 10; .* --data\.size=6"),
    "kinds": (lambda p: save(p / "04.png", pixels(1, channels=1)), {}, r"some pictures are grey, as \S*/04\.png, and some in colour, as \S*/\d\d\.png: .* --data\.channels=1 or --data\.channels=3"),
    "cut": (lambda p: cut(p / "04.png"), {}, r"/photos/04\.png cannot be read: image file is truncated"),
    "cut jpeg": (lambda p: cut(save(p / "04.jpg", pixels(3))), {}, r"/photos/04\.jpg cannot be read: (image file is truncated|Truncated File Read)"),
    "cut head": (lambda p: cut(p / "04.png", 0.1), {}, r"/photos/04\.png cannot be read"),
    "no picture": (lambda p: (p / "04.png").write_text("hello"), {}, r"/photos/04\.png cannot be read: it is no picture, or a damaged one"),
    "nothing in it": (lambda p: (p / "04.png").write_bytes(b""), {}, r"/photos/04\.png cannot be read: it is no picture"),
    "a link to nothing": (lambda p: (p / "99.png").symlink_to(p / "nowhere"), {}, r"/photos/99\.png cannot be read: No such file"),
    "a pipe": (lambda p: os.mkfifo(p / "99.png"), {}, r"/photos/99\.png cannot be read: it is a pipe"),
    "16 bits": (lambda p: sixteen_bits(p / "04.png"), {}, r"/photos/04\.png has 16 bits a channel: save it with 8 bits"),
    "16 bits in a TIFF": (lambda p: sixteen_bits(p / "04.tiff"), {}, r"/photos/04\.tiff has 16 bits a channel"),
    "inks": (lambda p: Image.fromarray(pixels(1)).convert("CMYK").save(p / "04.jpg"), {}, r"/photos/04\.jpg has channels CMYK"),
    "animation": (lambda p: animated(p / "04.gif"), {}, r"/photos/04\.gif has several frames"),
    "transparent": (lambda p: save(p / "04.png", pixels(1, channels=4)), {}, r"/photos/04\.png has transparent pixels, which have no colour"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_are_refused(case: str, tmp_path: Path) -> None:
    spoil, options, words = REFUSED[case]
    spoil(folder(tmp_path / "photos", {"": 10}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError) as caught:
            data = Images(str(tmp_path / "photos"), **options)
            data.prepare_data()
            data.setup()
    message = str(caught.value)
    assert re.search(words, message), message
    assert "\n" not in message and len(message) < 600


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "photos").write_text("x")
    with pytest.raises(InputError, match=r"--data\.path=\S*/photos is a file: give the folder that holds"):
        Images(str(tmp_path / "photos"))


def test_a_damaged_test_picture_is_found_before_training(tmp_path: Path) -> None:
    """By its head; what is damaged further down is found when the split is read."""
    folder(tmp_path, {"train": 3, "val": 2, "test": 2})
    (tmp_path / "test/01.png").write_text("hello")
    with pytest.raises(InputError, match=r"test/01\.png cannot be read"):
        Images(str(tmp_path)).prepare_data()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, r"--data\.size=0 must be a whole number >= 1, or height and width"),
        ({"size": [8]}, r"--data\.size=\[8\] must be"),
        ({"size": [8, -1]}, r"--data\.size=\[8, -1\] must be"),
        ({"channels": 4}, r"--data\.channels=4 must be 1 \(grey\), 3 \(RGB\) or null"),
        ({"val_fraction": 1.0}, r"--data\.val_fraction=1\.0 must lie strictly between 0 and 1"),
        ({"test_fraction": 0}, r"--data\.test_fraction=0 must lie strictly between 0 and 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        Images(str(folder(tmp_path, {"": 3})), **options)


def test_more_than_half_of_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, {"train": 10, "val": 1, "test": 1})
    data = Images(str(tmp_path), size=1000)
    monkeypatch.setattr(images, "_free_memory", lambda: 59_000_000)
    with pytest.raises(InputError) as caught:
        data.split("train")
    assert str(caught.value) == (
        f"{tmp_path}: 10 pictures for train of 3 x 1000 x 1000 bytes take 0.0 GB, more than half of the 0.1 GB of "
        "memory that are free: choose a smaller --data.size, or give fewer pictures"
    )
    monkeypatch.setattr(images, "_free_memory", lambda: 60_000_000)
    assert len(data.split("train")) == 10


def test_free_memory_is_that_of_this_machine() -> None:
    free = images._free_memory()
    assert free is not None and 100_000_000 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_only_heads_are_read_until_pictures_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a picture was decoded")

    folder(tmp_path, {"": 5})
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    data = Images(str(tmp_path))
    data.prepare_data()
    assert data.shape == (3, 8, 8)
    with pytest.raises(InputError, match="a picture was decoded"):
        data.split("val")


# the command line


SMALL = ["--model.network.width=8", "--model.network.blocks=1", "--model.schedule.T=6", "--trainer.precision=32-true"]


@pytest.fixture
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.cli
@pytest.mark.parametrize("channels", [1, 3])
def test_a_run_on_a_folder(channels: int, tmp_path: Path) -> None:
    """Trains, is tested and drawn from, with classes; not square, and the network follows the pictures."""
    folder(tmp_path / "photos", {"a": 12, "b": 8}, height=8, width=12, channels=channels)
    run = tmp_path / "run"
    output = run_ddpm(
        "fit", "-c", "configs/images.yaml", f"--data.path={tmp_path}/photos", "--data.batch_size=4",
        f"--run_dir={run}", "--trainer.max_steps=2", "--model.class_conditional=true", *SMALL,
    )  # fmt: skip
    assert "on Images (16 training images)" in output and "warn" not in output.lower()
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]["network"]["init_args"]
    assert (config["channels"], config["num_classes"]) == (channels, 2)
    assert "denoising" in run_ddpm("test", str(run))
    run_ddpm("sample", str(run), "--n=3", "--labels=[1]")
    drawn = load_file(run / "samples.safetensors")["images"]
    assert drawn.shape == (3, channels, 8, 12) and drawn.dtype == torch.uint8


@pytest.mark.cli
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "--data.path is missing: name the folder that holds the pictures"),
        ("--data.path=", "--data.path is missing"),
        ("--data.path={0}/nowhere", "--data.path={0}/nowhere does not exist: give the folder"),
        ("--data.path={0} --data.size=0", "--data.size=0 must be a whole number >= 1"),
        ("--data.path={0} --data.size=[8]", "--data.size=[8] must be a whole number >= 1"),
        ("--data.path={0} --data.channels=2", "--data.channels=2 must be 1 (grey), 3 (RGB) or null"),
        ("--data.path={0} --data.val_fraction=2", "--data.val_fraction=2.0 must lie strictly between 0 and 1"),
        ("--data.path={0} --data.size=30", "30 x 30 is not divisible by 4"),
        ("--data.path={0}", "--data.batch_size=128 is larger than the training split: choose at most 16"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: str, sentence: str, tmp_path: Path, in_the_project: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path, {"": 20})
    options = words.format(tmp_path).split()
    message = refused(capsys, "fit", "-c", "configs/images.yaml", f"--run_dir={tmp_path}/run", *SMALL, *options)
    assert sentence.format(tmp_path) in message and "Traceback" not in message
    assert message.startswith("ddpm: error: ") and len(message.splitlines()) == 1, message
