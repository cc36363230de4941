"""Grey levels and back, the training order, evaluation without padding, the splits, and what bad files say."""

import gzip
import itertools
import os
import socket
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from mnist_files import DATA_DIR, FILES, real_mnist, write_idx, write_mnist

from ddpm_lightning.data import MNIST, Batch, Digits, ImageDataModule, levels_to_model, model_to_levels
from ddpm_lightning.data.batches import EvalBatches, Split, TrainBatches
from ddpm_lightning.data.datamodule import SplitName
from ddpm_lightning.errors import InputError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def numbered(n: int, shape: tuple[int, int, int] = (1, 2, 3)) -> Split:
    """n images whose pixels all hold the row number, so that a batch shows which rows it came from."""
    labels = torch.arange(n)
    return Split(labels.to(torch.uint8).view(n, 1, 1, 1).expand(n, *shape).contiguous(), labels)


def take(batches: TrainBatches, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def train_batches(n: int = 23, batch_size: int = 6, seed: int = 3, at: int = 0, **ranks: int) -> TrainBatches:
    return TrainBatches(numbered(n), batch_size, seed, lambda: at, **ranks)


# grey levels and model range


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_survive_the_round_trip_for_every_number_of_levels(dtype: torch.dtype) -> None:
    for levels in range(2, 257):
        images = torch.arange(levels).to(torch.uint8)
        x = levels_to_model(images, levels, dtype)
        back = model_to_levels(x, levels)
        assert x.dtype == dtype and back.dtype == torch.uint8
        assert torch.equal(back, images), levels


@pytest.mark.parametrize("levels", [2, 3, 17, 100, 255, 256])
def test_level_k_sits_at_two_k_over_top_minus_one(levels: int) -> None:
    k = torch.arange(levels, dtype=torch.float64)
    exact = 2 * k / (levels - 1) - 1
    images = k.to(torch.uint8)
    torch.testing.assert_close(levels_to_model(images, levels, torch.float64), exact, rtol=0, atol=3e-16)
    x = levels_to_model(images, levels)
    assert torch.equal(x, ((2 * k - (levels - 1)) / (levels - 1)).float())
    assert x[0] == -1 and x[-1] == 1
    assert torch.equal(x, -x.flip(0))


def test_levels_to_model_keeps_shape_and_leaves_its_argument_alone() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    x = levels_to_model(images, 256)
    assert x.shape == images.shape and torch.equal(images, before)
    x_before = x.clone()
    assert torch.equal(model_to_levels(x, 256), images) and torch.equal(x, x_before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_model_to_levels_goes_to_the_nearest_level_and_clamps(dtype: torch.dtype) -> None:
    # 5 levels: -1, -0.5, 0, 0.5, 1
    x = torch.tensor([-7.0, -1.125, -0.875, -0.625, -0.125, 0.125, 0.375, 0.875, 1.5, 300.0], dtype=dtype)
    x_before = x.clone()
    assert model_to_levels(x, 5).tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4, 4]
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_not_rounded_again(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 999).to(dtype)
    exact = (x.double() + 1) * 127.5
    assert float((model_to_levels(x, 256) - exact).abs().max()) < 0.5001


@pytest.mark.parametrize("levels", [-1, 0, 1, 257])
def test_number_of_levels_out_of_range(levels: int) -> None:
    with pytest.raises(InputError, match=f"levels = {levels} must lie between 2 and 256"):
        levels_to_model(torch.zeros(1, dtype=torch.uint8), levels)
    with pytest.raises(InputError, match=f"levels = {levels} must lie between 2 and 256"):
        model_to_levels(torch.zeros(1), levels)


# training batches


def test_a_batch_holds_the_rows_that_its_index_names() -> None:
    split = numbered(23)
    for image, label, index, _ in take(train_batches(), 5):
        assert image.shape == (6, 1, 2, 3) and image.dtype == torch.uint8
        assert label.dtype == index.dtype == torch.int64
        assert torch.equal(image, split.images[index]) and torch.equal(label, split.labels[index])


def test_changing_a_batch_does_not_change_the_split() -> None:
    split = numbered(6)
    batches = [*take(TrainBatches(split, 6, 0, lambda: 0), 1), *EvalBatches(split, 6)]
    for batch in batches:
        batch.image.fill_(255)
        batch.label.fill_(-1)
    assert torch.equal(split.images, numbered(6).images) and torch.equal(split.labels, numbered(6).labels)


def test_order_from_any_position_is_the_order_from_the_start() -> None:
    straight = [batch.index.tolist() for batch in take(train_batches(), 14)]
    for position in range(13):
        resumed = [batch.index.tolist() for batch in take(train_batches(at=position), 14 - position)]
        assert resumed == straight[position:], position


def test_position_is_asked_for_when_an_iteration_starts() -> None:
    done = 0
    batches = TrainBatches(numbered(23), 6, 3, lambda: done)
    straight = [batch.index.tolist() for batch in take(batches, 8)]
    done = 5
    assert [batch.index.tolist() for batch in take(batches, 3)] == straight[5:]


@pytest.mark.parametrize(("n", "batch_size"), [(23, 6), (24, 6), (7, 7), (5, 1)])
def test_each_image_at_most_once_per_epoch(n: int, batch_size: int) -> None:
    batches = train_batches(n, batch_size)
    assert len(batches) == n // batch_size
    for epoch in range(3):
        indices = torch.cat(
            [b.index for b in take(train_batches(n, batch_size, at=epoch * len(batches)), len(batches))]
        )
        assert len(indices) == len(batches) * batch_size
        assert len(indices.unique()) == len(indices)
        assert int(indices.min()) >= 0 and int(indices.max()) < n


def test_order_depends_on_seed_and_epoch() -> None:
    def epoch_order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = train_batches(100, 100, seed, at=epoch)
        return tuple(take(batches, 1)[0].index.tolist())

    # the last two seeds agree in the low 32 bits with earlier ones: all that torch's CPU generator keeps of a seed
    orders = {epoch_order(seed, epoch) for seed in (0, 1, 2, 2**32, 2 + 2**32) for epoch in range(5)}
    assert len(orders) == 25
    # pinned: a change of the hash or of torch's permutation would break resuming across versions
    assert epoch_order(0, 0)[:4] == (82, 83, 78, 17)


def test_order_does_not_touch_or_read_the_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [batch.index.tolist() for batch in take(train_batches(), 4)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert [batch.index.tolist() for batch in take(train_batches(), 4)] == first


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_share_the_batch_of_one_process(world: int) -> None:
    whole = take(train_batches(), 7)
    shares = [take(train_batches(rank=rank, world=world), 7) for rank in range(world)]
    for step, batch in enumerate(whole):
        for field in ("image", "label", "index"):
            parts = [getattr(shares[rank][step], field) for rank in range(world)]
            assert {len(part) for part in parts} == {6 // world}
            assert torch.equal(torch.cat(parts), getattr(batch, field))


def test_a_batch_that_ranks_cannot_share() -> None:
    with pytest.raises(InputError, match=r"--data\.batch_size=6 .* 4 processes: choose a multiple of 4"):
        train_batches(world=4)


def test_a_batch_larger_than_the_split() -> None:
    with pytest.raises(InputError, match=r"--data\.batch_size=24 .* choose at most 23"):
        train_batches(batch_size=24)


# evaluation batches


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("limit", "expected"), [(None, 23), (10, 10), (1, 1), (99, 23)])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_evaluation_meets_each_image_once(world: int, limit: int | None, expected: int, batch_size: int) -> None:
    split = numbered(23)
    seen: list[int] = []
    for rank in range(world):
        loader = EvalBatches(split, batch_size, rank, world, limit)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch.index) == batch_size for batch in batches[:-1])
        for batch in batches:
            assert 1 <= len(batch.index) <= batch_size
            assert torch.equal(batch.image, split.images[batch.index])
            assert torch.equal(batch.label, split.labels[batch.index])
            seen += batch.index.tolist()
        assert [batch.index.tolist() for batch in loader] == [batch.index.tolist() for batch in batches]
    assert sorted(seen) == list(range(expected))


# the data module


class Numbered(ImageDataModule):
    """23 training images whose pixels are their row number; counts how often it loads."""

    shape = (1, 2, 3)
    levels = 32
    num_classes = 30

    def __init__(self, **options: Any) -> None:
        super().__init__({"train": 23, "val": 9, "test": 11}, **{"batch_size": 6, "eval_batch_size": 4, **options})
        self.loads: list[SplitName] = []

    def load(self, split: SplitName) -> Split:
        self.loads.append(split)
        return numbered(self.sizes[split])


@pytest.mark.parametrize(
    ("stage", "loaded"),
    [
        ("fit", ["train", "val"]),
        ("validate", ["val"]),
        ("test", ["test"]),
        ("predict", ["test"]),
        (None, ["train", "val", "test"]),
    ],
)
def test_setup_loads_what_the_stage_needs_once(stage: str | None, loaded: list[str]) -> None:
    data = Numbered()
    assert data.loads == []
    data.setup(stage)
    data.setup(stage)
    assert data.loads == loaded


def test_loaders_without_a_trainer() -> None:
    data = Numbered(limit_val=5, limit_test=7)
    data.setup()
    straight = TrainBatches(numbered(23), 6, 0, lambda: 0)
    assert [b.index.tolist() for b in take(data.train_dataloader(), 5)] == [b.index.tolist() for b in take(straight, 5)]
    assert [b.index.tolist() for b in data.val_dataloader()] == [[0, 1, 2, 3], [4]]
    assert [b.index.tolist() for b in data.test_dataloader()] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [b.index.tolist() for b in data.predict_dataloader()] == [[0, 1, 2, 3], [4, 5, 6]]
    assert len(data.split("val")) == 9


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "limit_val", "limit_test"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True])
def test_options_that_must_be_positive(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"--data\.{name}={value} must be a whole number >= 1"):
        Numbered(**{name: value})


def test_seed_must_not_be_negative() -> None:
    assert Numbered(seed=0).seed == 0
    with pytest.raises(InputError, match=r"--data\.seed=-1 must be a whole number >= 0"):
        Numbered(seed=-1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: Split(s.images[:-1], s.labels), r"load\('val'\) returned images .*\[8, 1, 2, 3\].*\[9, 1, 2, 3\]"),
        (lambda s: Split(s.images.float(), s.labels), "images float32 from 0 to 8: give uint8 grey levels 0..31"),
        (lambda s: Split(s.images, s.labels.int()), "labels torch.int32 .* expected torch.int64"),
        (lambda s: Split(s.images + 100, s.labels), r"images from 100 to 108, expected values in 0\.\.31"),
        (lambda s: Split(s.images, s.labels - 1), r"labels from -1 to 7, expected values in 0\.\.29"),
        (lambda s: Split(s.images, s.labels + 22), r"labels from 22 to 30, expected values in 0\.\.29"),
    ],
)
def test_data_other_than_stated(spoil: Callable[[Split], Split], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Numbered()
    monkeypatch.setattr(data, "load", lambda name: spoil(numbered(data.sizes[name])))
    with pytest.raises(InputError, match=message):
        data.setup("validate")


class Recorder(pl.LightningModule):
    """Trains one weight and writes down the rows of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[list[int]] = []
        self.evaluated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.trained.append(batch.index.tolist())
        return self.weight * batch.image.float().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.evaluated += batch.index.tolist()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluated += batch.index.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(root: Path, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=root, accelerator="cpu", devices=1, **quiet, **options)


@pytest.mark.filterwarnings("error:.*dataloader is not resumable")
@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 8, "max_epochs": -1}])
def test_a_resumed_run_sees_the_batches_of_an_unbroken_one(length: dict[str, int], tmp_path: Path) -> None:
    every_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken = Recorder()
    trainer(tmp_path, callbacks=[every_step], **length).fit(unbroken, datamodule=Numbered())
    steps = length.get("max_steps", 9)
    assert unbroken.trained == [b.index.tolist() for b in take(Numbered().train_dataloader(), steps)]
    for step in (1, 3, 5, 6):  # in the middle of an epoch, and at its end: an epoch has 3 batches
        resumed = Recorder()
        trainer(tmp_path, enable_checkpointing=False, **length).fit(
            resumed, datamodule=Numbered(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True
        )
        assert resumed.trained == unbroken.trained[step:], step


def test_a_run_that_broke_inside_a_step_repeats_the_batch_of_that_step(tmp_path: Path) -> None:
    class Breaks(Recorder):
        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            if len(self.trained) == 4:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    last = ModelCheckpoint(tmp_path, save_on_exception=True, every_n_train_steps=100)
    broken = Breaks()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, callbacks=[last], max_epochs=3).fit(broken, datamodule=Numbered())
    (path,) = tmp_path.glob("*.ckpt")
    resumed = Recorder()
    trainer(tmp_path, enable_checkpointing=False, max_epochs=3).fit(
        resumed, datamodule=Numbered(), ckpt_path=path, weights_only=True
    )
    unbroken = [batch.index.tolist() for batch in take(Numbered().train_dataloader(), 9)]
    assert broken.trained == unbroken[:4] and resumed.trained == unbroken[4:]


def test_the_trainer_evaluates_each_image_once(tmp_path: Path) -> None:
    model = Recorder()
    fresh = trainer(tmp_path, enable_checkpointing=False)
    fresh.validate(model, datamodule=Numbered(), verbose=False)
    assert model.evaluated == list(range(9))
    model.evaluated.clear()
    fresh.test(model, datamodule=Numbered(limit_test=6), verbose=False)
    assert model.evaluated == list(range(6))


# the digits


def test_digits_splits_are_disjoint_complete_and_fixed() -> None:
    from sklearn.datasets import load_digits

    data = Digits(seed=5)
    assert (data.shape, data.levels, data.num_classes) == ((1, 8, 8), 17, 10)
    assert data.sizes == {"train": 1300, "val": 200, "test": 297}
    data.setup()
    rows = {bytes(image.astype("uint8").tobytes()): i for i, image in enumerate(load_digits().images)}
    assert len(rows) == 1797  # no two images are the same, so an image tells its row
    targets = torch.from_numpy(load_digits().target).long()
    splits: dict[str, list[int]] = {}
    for name in ("train", "val", "test"):
        split = data.split(name)
        splits[name] = [rows[image.numpy().tobytes()] for image in split.images]
        assert len(split) == data.sizes[name]
        assert torch.equal(split.labels, targets[splits[name]])
        assert set(split.labels.tolist()) == set(range(10))
    assert sorted(itertools.chain(*splits.values())) == list(range(1797))
    # pinned: a change of torch's permutation would make old and new results incomparable
    assert {name: indices[:4] for name, indices in splits.items()} == {
        "train": [1202, 348, 222, 1637],
        "val": [1143, 1083, 297, 103],
        "test": [648, 1374, 1237, 1117],
    }


# MNIST


def test_mnist_states_its_facts_without_files() -> None:
    data = MNIST("/nowhere", val_size=1_000, download=False)
    assert (data.shape, data.levels, data.num_classes) == ((1, 28, 28), 256, 10)
    assert data.sizes == {"train": 59_000, "val": 1_000, "test": 10_000}


@pytest.mark.parametrize("val_size", [0, -1, 60_000, 0.1])
def test_mnist_val_size_out_of_range(val_size: Any) -> None:
    with pytest.raises(InputError, match=rf"--data\.val_size={val_size} must be a whole number from 1 to 59999"):
        MNIST(val_size=val_size)


@real_mnist
@pytest.mark.mnist
def test_official_mnist_counts_and_fixed_split() -> None:
    data = MNIST(str(DATA_DIR), download=False, seed=11)
    data.prepare_data()
    data.setup()
    train, val, test = data.split("train"), data.split("val"), data.split("test")
    assert [len(train), len(val), len(test)] == [55_000, 5_000, 10_000]
    per_class = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(torch.cat([train.labels, val.labels])).tolist() == per_class
    assert torch.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

    raw = (DATA_DIR / "MNIST" / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
    rows = {raw[start : start + 784]: start // 784 for start in range(0, len(raw), 784)}
    assert len(rows) == 60_000  # no two training images are the same, so an image tells its row
    train_rows, val_rows = ([rows[image.numpy().tobytes()] for image in split.images] for split in (train, val))
    assert sorted(train_rows + val_rows) == list(range(60_000))
    assert val_rows[:4] == [21634, 5292, 16973, 1725]  # pinned: see the digits

    targets = torch.tensor(list((DATA_DIR / "MNIST" / "raw" / "train-labels-idx1-ubyte").read_bytes()[8:]))
    assert torch.equal(train.labels, targets[train_rows]) and torch.equal(val.labels, targets[val_rows])
    small = MNIST(str(DATA_DIR), val_size=100, download=False)
    small.setup("validate")
    assert torch.equal(small.split("val").images, val.images[:100])


def say(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    """The message names all of these, and no other traceback hangs on to it."""
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__context__ is None or error.value.__suppress_context__


def failing_download(error: Exception, half_a_file: bool = False) -> Callable[..., None]:
    """What torchvision's MNIST does when the network is gone."""

    def construct(root: str, **options: Any) -> None:
        assert options == {"download": True}
        if half_a_file:
            raw = Path(root) / "MNIST" / "raw"
            raw.mkdir(parents=True)
            (raw / "train-images-idx3-ubyte").write_bytes(b"half")
        sys.stderr.write("0.00B [00:00, ?B/s]")
        raise error

    return construct


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried http://a, got:\n<urlopen error no route>"),
        TimeoutError("timed out"),
        EOFError(),
    ],
)
def test_a_failing_download_is_one_message_and_leaves_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchvision.datasets, "MNIST", failing_download(error, half_a_file=True))
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "data/MNIST/raw/t10k-labels-idx1-ubyte", (10_000,))
    with pytest.raises(InputError) as caught:
        MNIST().prepare_data()
    missing = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte."
    folder = str((tmp_path / "data/MNIST/raw").resolve())
    say(caught, missing, folder, "--data.root=data", "-c configs/digits.yaml", "download failed")
    say(caught, str(error).split("\n")[-1] or "EOFError")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["t10k-labels-idx1-ubyte"]
    assert not list(tmp_path.rglob(".unfinished-*"))
    with pytest.raises(InputError, match="download failed"):
        MNIST("new/data").prepare_data()
    assert not Path("new").exists()
    assert "B/s" not in capsys.readouterr().err
    assert socket.getdefaulttimeout() is None


def test_a_download_brings_what_is_missing_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def construct(root: str, download: bool) -> None:
        calls.append(root)
        write_mnist(Path(root))

    monkeypatch.setattr(torchvision.datasets, "MNIST", construct)
    mine = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    write_idx(mine, (60_000,))
    with mine.open("r+b") as file:
        file.seek(8)
        file.write(bytes([7]))
    for _ in range(2):
        MNIST(str(tmp_path)).prepare_data()
    assert len(calls) == 1
    assert sorted(path.name for path in mine.parent.iterdir()) == sorted(FILES)
    assert mine.read_bytes()[8] == 7


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError) as caught:
        MNIST(str(tmp_path / "file")).prepare_data()
    say(caught, "MNIST files are missing", "--data.root=", "Not a directory")


@pytest.mark.parametrize("step", ["prepare_data", "setup"])
def test_missing_files_without_download(step: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        getattr(MNIST(str(tmp_path), download=False), step)()
    names = "train-images-idx3-ubyte, train-labels-idx1-ubyte"
    say(caught, names, str(tmp_path.resolve() / "MNIST/raw"), f"--data.root={tmp_path}", "-c configs/digits.yaml")
    assert list(tmp_path.iterdir()) == []
    if step == "prepare_data":
        say(caught, "--data.download=false", "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte")


def test_whole_files_are_taken_and_nothing_is_written(tmp_path: Path) -> None:
    raw = write_mnist(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    data = MNIST(str(tmp_path), download=False)
    data.prepare_data()
    data.setup()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert {path.name for path in raw.iterdir()} == set(FILES)
    assert data.split("train").images.shape == (55_000, 1, 28, 28)
    assert data.split("val").images.shape == (5_000, 1, 28, 28)
    assert data.split("test").images.shape == (10_000, 1, 28, 28)


@pytest.mark.parametrize("step", ["prepare_data", "setup"])
@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("missing_bytes", [1, -1])
def test_a_file_of_another_size(step: str, name: str, missing_bytes: int, tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / name
    write_idx(path, FILES[name], missing_bytes=missing_bytes)
    found = path.stat().st_size
    with pytest.raises(InputError) as caught:
        getattr(MNIST(str(tmp_path)), step)()
    what = "x".join(map(str, FILES[name]))
    say(caught, str(path), f"expected {what} uint8 = {found + missing_bytes} bytes", f"found {found} bytes")
    say(caught, "Delete it and run again", "--data.download")


def test_an_empty_file(tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / "t10k-images-idx3-ubyte"
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        MNIST(str(tmp_path)).prepare_data()
    say(caught, str(path), "found 0 bytes")


@pytest.mark.parametrize(
    ("shape", "type_code", "found"),
    [
        ((10_000, 14, 56), 0x08, "(2051, 10000, 14, 56)"),  # another shape of the same size
        ((10_000, 28, 28), 0x09, "(2307, 10000, 28, 28)"),  # signed bytes
    ],
)
def test_a_foreign_file_of_the_right_size(shape: tuple[int, ...], type_code: int, found: str, tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / "t10k-images-idx3-ubyte"
    write_idx(path, shape, type_code=type_code)
    with pytest.raises(InputError) as caught:
        MNIST(str(tmp_path)).prepare_data()
    say(caught, str(path), "expected 10000x28x28 uint8", "(2051, 10000, 28, 28)", f"found {found}", "Delete it")


def test_labels_that_are_no_digits(tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte"
    with path.open("r+b") as file:
        file.seek(100)
        file.write(bytes([10]))
    with pytest.raises(InputError, match=r"labels from 0 to 10, expected values in 0\.\.9"):
        MNIST(str(tmp_path)).setup("test")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    path = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError) as caught:
        MNIST(str(tmp_path)).prepare_data()
    say(caught, str(path), "Is a directory", "Delete it")


def test_packed_files_are_unpacked(tmp_path: Path) -> None:
    raw = write_mnist(tmp_path)
    for name in FILES:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes(), 1))
        (raw / name).unlink()
    data = MNIST(str(tmp_path), download=False)
    data.prepare_data()
    assert {path.name for path in raw.iterdir()} == {*FILES, *(f"{name}.gz" for name in FILES)}
    data.setup("test")
    assert len(data.split("test")) == 10_000


@pytest.mark.parametrize("content", ["truncated", "foreign", "bomb", "pipe"])
def test_a_damaged_packed_file(content: str, tmp_path: Path) -> None:
    raw = write_mnist(tmp_path)
    path = raw / "t10k-labels-idx1-ubyte"
    packed = raw / "t10k-labels-idx1-ubyte.gz"
    if content == "pipe":
        os.mkfifo(packed)
    else:
        whole, bomb = gzip.compress(path.read_bytes()), gzip.compress(bytes(50_000_000))
        packed.write_bytes({"truncated": whole[:-20], "foreign": b"<html>404</html>", "bomb": bomb}[content])
    path.unlink()
    with pytest.raises(InputError) as caught:
        tracemalloc.start()
        try:
            MNIST(str(tmp_path), download=False).prepare_data()
        finally:
            used = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    reasons = {"bomb": "does not hold the 10008 bytes", "pipe": "it is a pipe"}
    say(caught, str(packed), reasons.get(content, "cannot be read"), "Delete it and run again")
    assert used < 5_000_000
    assert not path.exists() and not list(raw.glob(".unfinished-*"))


def test_packed_files_in_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_mnist(tmp_path)
    path = raw / "t10k-labels-idx1-ubyte"
    (raw / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system")  # chmod would not stop root

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(InputError) as caught:
        MNIST(str(tmp_path), download=False).prepare_data()
    say(caught, f"{path}.gz", "Read-only file system", "--data.root")
