"""Fashion-MNIST and CIFAR-10 in the official files' own formats, with made-up pictures."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import run_ddpm
from mnist_files import FILES, write_idx, write_mnist
from picture_files import CIFAR_FILES, write_cifar

from ddpm_lightning.data import CIFAR10, MNIST, FashionMNIST
from ddpm_lightning.errors import InputError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of a whole set of files, which torchvision takes for the official ones."""
    root = tmp_path_factory.mktemp("cifar")
    with pytest.MonkeyPatch.context() as patch:
        write_cifar(root, patch)
        yield root


def write_fashion(root: Path) -> Path:
    for name, shape in FILES.items():
        write_idx(root / "FashionMNIST/raw" / name, shape)
    return root / "FashionMNIST/raw"


def said(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    for part in parts:
        assert part in str(error.value), str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__context__ is None or error.value.__suppress_context__


# Fashion-MNIST


def test_fashion_mnist_is_read_from_its_own_folder(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    raw = write_fashion(tmp_path)
    for file, place, value in (("t10k-images-idx3-ubyte", 16 + 3 * 784, 77), ("t10k-labels-idx1-ubyte", 8 + 3, 6)):
        with (raw / file).open("r+b") as stream:
            stream.seek(place)
            stream.write(bytes([value]))
    data = FashionMNIST(str(tmp_path), val_size=1_000, download=False)
    assert (data.shape, data.levels, data.num_classes) == ((1, 28, 28), 256, 10)
    data.prepare_data()
    data.setup()
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [59_000, 1_000, 10_000]
    test = data.split("test")
    assert (int(test.images[3, 0, 0, 0]), int(test.images.long().sum()), int(test.labels[3])) == (77, 77, 6)
    mnist = MNIST(str(tmp_path), download=False).split("test")
    assert int(mnist.images.max()) == int(mnist.labels.max()) == 0


def test_fashion_mnist_that_is_missing(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with pytest.raises(InputError) as caught:
        FashionMNIST(str(tmp_path), download=False).prepare_data()
    said(
        caught, "FashionMNIST files are missing: train-images", f"{tmp_path}/FashionMNIST/raw", "--data.download=false"
    )
    said(caught, "set --data.root to the folder that holds FashionMNIST/raw")


def test_a_damaged_file_of_fashion_mnist(tmp_path: Path) -> None:
    raw = write_fashion(tmp_path)
    write_idx(raw / "t10k-labels-idx1-ubyte", (10_000,), missing_bytes=1)
    with pytest.raises(InputError) as caught:
        FashionMNIST(str(tmp_path)).prepare_data()
    said(caught, f"{raw}/t10k-labels-idx1-ubyte is damaged or another file", "Delete it and run again")


@pytest.mark.parametrize("data", [FashionMNIST, CIFAR10])
def test_without_a_network_one_sentence_says_so(
    data: type[MNIST], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of torchvision's own attempt to download."""
    with pytest.raises(InputError) as caught:
        data(str(tmp_path)).prepare_data()
    said(
        caught,
        f"{data.title} files are missing",
        "and the download failed (",
        "no route to host",
        "configs/digits.yaml",
    )
    printed = capsys.readouterr()
    assert printed.err == f"downloading {data.title} ({data.megabytes} MB) to {tmp_path}/{data.folder}\n"
    assert printed.out == "" and not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("data", [FashionMNIST, CIFAR10])
@pytest.mark.parametrize("val_size", [0, "train_size", 2.5])
def test_val_size_out_of_range(data: type[MNIST], val_size: Any) -> None:
    value = data.train_size if val_size == "train_size" else val_size
    with pytest.raises(InputError, match=rf"--data\.val_size={value} must be .* 1 to {data.train_size - 1}"):
        data(val_size=value)


# CIFAR-10


def test_cifar10_states_its_facts_without_files() -> None:
    data = CIFAR10("/nowhere", val_size=1_000, download=False)
    assert (data.shape, data.levels, data.num_classes) == ((3, 32, 32), 256, 10)
    assert data.sizes == {"train": 49_000, "val": 1_000, "test": 10_000}


def test_cifar10_is_read_as_torchvision_reads_it(cifar: Path) -> None:
    """Every picture, with the validation images drawn once and for all, and nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in cifar.rglob("*")}
    data = CIFAR10(str(cifar), download=False)
    data.prepare_data()
    data.setup()
    assert {path: path.stat().st_mtime_ns for path in cifar.rglob("*")} == before
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(50_000))
    assert order[:3].tolist() == [7616, 29278, 3155]  # pinned: results are comparable only on the same split
    for name, rows in (("train", order[5_000:]), ("val", order[:5_000]), ("test", slice(None))):
        split = data.split(name)  # type: ignore[arg-type]
        theirs = _theirs(cifar, train=name != "test")
        assert torch.equal(split.images, theirs[0][rows]) and torch.equal(split.labels, theirs[1][rows])
    test = data.split("test")
    assert test.images[0, :, 0, 0].tolist() == [5, 15, 25] and test.labels[:4].tolist() == [5, 9, 0, 1]
    small = CIFAR10(str(cifar), val_size=100, download=False).split("val")
    assert torch.equal(small.labels, data.split("val").labels[:100])


def _theirs(root: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
        theirs = torchvision.datasets.CIFAR10(str(root), train=train)
    return torch.from_numpy(theirs.data).permute(0, 3, 1, 2), torch.tensor(theirs.targets)


@pytest.mark.parametrize("step", ["prepare_data", "setup"])
def test_cifar10_that_is_missing(step: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        getattr(CIFAR10(str(tmp_path), download=False), step)()
    said(caught, "CIFAR10 files are missing: data_batch_1, data_batch_2,", f"Looked in {tmp_path}/cifar-10-batches-py")
    said(caught, "set --data.root to the folder that holds cifar-10-batches-py")


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(10**11)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "one byte": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "is damaged or another file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:1_000]), "is damaged or another file: its md5 is"),
    "a hundred gigabytes": (longer, "is damaged or another file: its md5 is"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or another file: its md5 is d41d8cd98f00b2"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.parametrize("step", ["prepare_data", "setup"])
def test_a_damaged_file_of_cifar10(case: str, step: str, cifar: Path, tmp_path: Path) -> None:
    spoil, words = SPOILT[case]
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in CIFAR_FILES:
        (folder / name).hardlink_to(cifar / "cifar-10-batches-py" / name)
    path = folder / "test_batch"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    spoil(path)
    with pytest.raises(InputError) as caught:
        data = CIFAR10(str(tmp_path))
        data.prepare_data() if step == "prepare_data" else data.setup("test")
    said(caught, f"{path} {words}", "Delete it and run again (--data.download=true fetches it anew)")


@pytest.mark.parametrize("name", [b"posix\nsystem", b"builtins\neval", b"numpy\nload"])
def test_a_pickle_that_names_anything_but_arrays(name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where its md5 is the right one."""
    path = write_cifar(tmp_path, monkeypatch, name) / "test_batch"
    with pytest.raises(InputError) as caught:
        CIFAR10(str(tmp_path)).setup("test")
    named = name.decode().replace("\n", ".")
    said(caught, f"{path} cannot be read: it names {named}, which is no part of an array", "Delete it and run again")


def packed(root: Path, source: Path) -> bytes:
    """The archive, with a file in it that no one asked for."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        archive.add(source / "cifar-10-batches-py", "cifar-10-batches-py")
        archive.addfile(tarfile.TarInfo("../outside"))
    (root / "cifar-10-python.tar.gz").write_bytes(buffer.getvalue())
    return buffer.getvalue()


def test_an_archive_is_unpacked(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    root.mkdir()
    content = packed(root, cifar)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    data = CIFAR10(str(root), download=False)
    data.prepare_data()
    assert {path.name for path in root.iterdir()} == {"cifar-10-python.tar.gz", "cifar-10-batches-py"}
    assert {path.name for path in (root / "cifar-10-batches-py").iterdir()} == {*CIFAR_FILES}
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert len(data.split("test")) == 10_000


def test_a_damaged_archive(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_text("<html>404</html>")
    with pytest.raises(InputError) as caught:
        CIFAR10(str(tmp_path)).prepare_data()
    said(
        caught,
        f"{tmp_path}/cifar-10-python.tar.gz is damaged or another file: its md5 is",
        "c58f30108f718f92721af3b95e74349a",
    )
    said(caught, "Delete it and run again, or put a good copy there")
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


def test_a_download_brings_what_is_missing(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def construct(root: str, download: bool) -> None:
        calls.append(root)
        (Path(root) / "cifar-10-batches-py").symlink_to(tmp_path / "copy")

    (tmp_path / "copy").mkdir()
    for name in CIFAR_FILES:
        (tmp_path / "copy" / name).hardlink_to(cifar / "cifar-10-batches-py" / name)
    fake = type("CIFAR10", (torchvision.datasets.CIFAR10,), {"__new__": lambda cls, *a, **k: construct(*a, **k)})
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    for _ in range(2):
        CIFAR10(str(tmp_path / "data")).prepare_data()
    assert len(calls) == 1
    assert {path.name for path in (tmp_path / "data/cifar-10-batches-py").iterdir()} == {*CIFAR_FILES}


@pytest.mark.cli
@pytest.mark.parametrize("config", ["cifar10", "fashion_mnist"])
def test_a_run_on_official_files(config: str, cifar: Path, tmp_path: Path) -> None:
    if config == "fashion_mnist":
        write_fashion(tmp_path)
    root = cifar if config == "cifar10" else tmp_path
    run = str(tmp_path / "run")
    small = ["--model.network.width=8", "--model.network.blocks=1", "--model.schedule.T=6", "--data.batch_size=4"]
    output = run_ddpm(
        "fit", "-c", f"configs/{config}.yaml", f"--data.root={root}", f"--run_dir={run}", "--trainer.max_steps=2",
        "--trainer.precision=32-true", *small,
    )  # fmt: skip
    assert "warn" not in output.lower()
    run_ddpm("sample", run, "--n=2")
    assert (tmp_path / "run/samples.png").is_file()
