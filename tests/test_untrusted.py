"""Files of others for inpainting: each that is refused is refused in one sentence, in little memory, at once."""

import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import Evil
from PIL import Image
from safetensors.torch import save_file

from ddpm_lightning.errors import InputError
from ddpm_lightning.sampling.known import read_images, read_inpainting, read_mask

GREY, COLOUR = (1, 8, 8), (3, 8, 8)
LEVEL = np.arange(64, dtype=np.uint8).reshape(8, 8)
Files = Callable[[Path], object]


def npy(shape: tuple[int, ...], dtype: str = "|u1", content: bytes = b"", version: int = 1) -> bytes:
    """An array file that says what it is told to say."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return (
        b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header + content
    )


def npz(path: Path, content: bytes, name: str = "images.npy", method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, content)


def changed(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def encrypted(path: Path) -> None:
    npz(path, npy(GREY))

    def mark(content: bytearray) -> None:
        content[6] |= 1
        content[content.index(b"PK\1\2") + 8] |= 1

    changed(path, mark)


def damaged(path: Path) -> None:
    npz(path, npy((1, *GREY), content=LEVEL.tobytes()), method=zipfile.ZIP_STORED)
    changed(path, lambda content: content.__setitem__(content.index(LEVEL.tobytes()) + 9, 255))


def safetensors(path: Path, shape: list[int], end: int, content: bytes, length: int | None = None) -> None:
    header = str({"images": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]}}).replace("'", '"').encode()
    path.write_bytes(struct.pack("<Q", length or len(header)) + header + content)


def png(path: Path, *chunks: tuple[bytes, bytes], size: tuple[int, int] = (8, 8), bits: int = 8, kind: int = 0) -> None:
    """A picture of these chunks between its head and its (black) pixels."""
    width, height = size
    pixels = zlib.compress(bytes(height * (1 + width * bits // 8 * {0: 1, 2: 3}[kind]) if width < 10_000 else 64))
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    written = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


def picture(mode: str, **options: Any) -> Files:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.stack([LEVEL] * channels, 2) if channels > 1 else LEVEL
    return lambda path: Image.fromarray(values, mode).save(path, **options)


def coloured(path: Path) -> None:
    Image.fromarray(np.stack([LEVEL, LEVEL.T, LEVEL], 2)).save(path)


def animated(path: Path) -> None:
    frames = [Image.fromarray(LEVEL), Image.fromarray(LEVEL.T.copy())]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def whole() -> bytes:
    buffer = BytesIO()
    Image.fromarray(LEVEL).save(buffer, "PNG")
    return buffer.getvalue()


BOMB = zlib.compress(bytes(30_000_000))
# ruff: noqa: E501
# name of the file, how it is made, shape of the model's images, what is said
REFUSED: dict[str, tuple[str, Files, tuple[int, ...], str]] = {
    "empty npz": ("a.npz", Path.touch, GREY, "it is empty"),
    "empty safetensors": ("a.safetensors", Path.touch, GREY, "it is empty"),
    "empty picture": ("a.png", Path.touch, GREY, "is no picture"),
    "text": ("a.png", lambda p: p.write_text("hello"), GREY, "is no picture"),
    "an array alone": ("a.npy", lambda p: np.save(p, LEVEL), GREY, "is no picture"),
    "no archive": ("a.npz", lambda p: p.write_text("hello"), GREY, "cannot be read"),
    "cut archive": ("a.npz", lambda p: (npz(p, npy((1, *GREY), content=bytes(64))), p.write_bytes(p.read_bytes()[:-9])), GREY, "cannot be read"),
    "encrypted": ("a.npz", encrypted, GREY, "it is encrypted"),
    "wrong checksum": ("a.npz", damaged, GREY, "CRC"),
    "another compression": ("a.npz", lambda p: npz(p, npy(GREY), method=zipfile.ZIP_LZMA), GREY, "numpy.savez"),
    "no images": ("a.npz", lambda p: np.savez(p, pictures=LEVEL), GREY, "holds no array images, only pictures"),
    "no array": ("a.npz", lambda p: npz(p, b"hello"), GREY, "cannot be read"),
    "objects": ("a.npz", lambda p: np.savez(p, images=np.full((1, 1, 8, 8), Evil("touch executed"))), GREY, "not object"),
    "10^13 images": ("a.npz", lambda p: npz(p, npy((10**13, *GREY))), GREY, "for 10000000000000 images: give one"),
    "negative": ("a.npz", lambda p: npz(p, npy((-1, *GREY))), GREY, "give one"),
    "none": ("a.npz", lambda p: np.savez(p, images=np.zeros((0, *GREY), np.uint8)), GREY, "for 0 images"),
    "zip bomb": ("a.npz", lambda p: npz(p, npy((1, *GREY), content=bytes(30_000_000))), GREY, "not as long as its shape"),
    "too short": ("a.npz", lambda p: npz(p, npy((1, *GREY), content=bytes(9))), GREY, "not as long as its shape"),
    "long header": ("a.npz", lambda p: npz(p, npy((1, *GREY), "|u1" + " " * 30_000_000, version=2)), GREY, "cannot be read"),
    "another version": ("a.npz", lambda p: npz(p, npy((1, *GREY), version=9)), GREY, "cannot be read"),
    "float": ("a.npz", lambda p: np.savez(p, images=np.zeros((1, *GREY))), GREY, "not float64"),
    "level too high": ("a.npz", lambda p: np.savez(p, images=np.full((1, *GREY), 17, np.uint8)), GREY, "not up to 17"),
    "float tensor": ("a.safetensors", lambda p: save_file({"images": torch.zeros(1, *GREY)}, p), GREY, "not F32"),
    "10^13 tensors": ("a.safetensors", lambda p: safetensors(p, [10**13, 1, 8, 8], 64 * 10**13, bytes(64)), GREY, "cannot be read"),
    "lying offsets": ("a.safetensors", lambda p: safetensors(p, [1, 1, 8, 8], 10**9, bytes(64)), GREY, "cannot be read"),
    "lying length": ("a.safetensors", lambda p: safetensors(p, [1, 1, 8, 8], 64, bytes(64), 2**62), GREY, "cannot be read"),
    "sparse": ("a.safetensors", lambda p: (safetensors(p, [10**9, 1, 8, 8], 64 * 10**9, b""), os.truncate(p, p.stat().st_size + 64 * 10**9)), GREY, ""),
    "folder": ("a.npz", Path.mkdir, GREY, "Is a directory"),
    "pipe": ("a.png", os.mkfifo, GREY, "it is a pipe"),
    "pipe of arrays": ("a.npz", os.mkfifo, GREY, "it is a pipe"),
    "pipe of tensors": ("a.safetensors", os.mkfifo, GREY, "it is a pipe"),
    "nothing": ("a.png", lambda p: None, GREY, "No such file"),
    "no arrays": ("a.npz", lambda p: None, GREY, "No such file"),
    "cut picture": ("a.png", lambda p: p.write_bytes(whole()[:45]), GREY, "cannot be read"),
    "huge picture": ("a.png", lambda p: png(p, size=(12_000, 12_000)), GREY, "[1, 12000, 12000]"),
    "gigantic picture": ("a.png", lambda p: png(p, size=(2**30, 2**30)), GREY, "cannot be read"),
    "zTXt": ("a.png", lambda p: png(p, (b"zTXt", b"a\0\0" + BOMB)), GREY, "Decompressed data too large"),
    "iTXt": ("a.png", lambda p: png(p, (b"iTXt", b"a\0\1\0\0\0" + BOMB)), GREY, "Decompressed data too large"),
    "16 bits": ("a.png", lambda p: png(p, bits=16), GREY, "16 bits"),
    "16 bits in colour": ("a.png", lambda p: png(p, bits=16, kind=2), COLOUR, "16 bits"),
    "inks": ("a.jpg", picture("CMYK"), COLOUR, "channels CMYK"),
    "alpha": ("a.png", picture("RGBA"), COLOUR, "transparent pixels"),
    "grey alpha": ("a.png", picture("LA"), GREY, "transparent pixels"),
    "transparent palette": ("a.png", lambda p: Image.fromarray(np.dstack([LEVEL] * 3)).quantize(9).save(p, transparency=3), COLOUR, "transparent pixels"),
    "animation": ("a.png", animated, GREY, "several frames"),
    "grey for colour": ("a.png", picture("L"), COLOUR, "is grey: this model's images are in colour"),
    "colour for grey": ("a.png", coloured, GREY, "is in colour"),
    "picture of 5 channels": ("a.png", picture("RGB"), (5, 8, 8), "images of 5 channels must come in"),
    "another size": ("a.png", lambda p: Image.fromarray(LEVEL[:4]).save(p), GREY, "[1, 4, 8]"),
}  # fmt: skip
MASKS: dict[str, tuple[str, Files, tuple[int, ...], str]] = {
    "not black and white": ("a.png", picture("L"), GREY, "must be black and white"),
    "numbers": ("a.npz", lambda p: np.savez(p, mask=LEVEL), GREY, "mask must be bool"),
    "another size": ("a.npz", lambda p: np.savez(p, mask=LEVEL[:4] > 9), GREY, r"[1, 4, 8] (channels, height, width)"),
    "no channel of the model": ("a.npz", lambda p: np.savez(p, mask=np.ones((2, 8, 8), bool)), COLOUR, "[2, 8, 8]"),
    "too many": ("a.npz", lambda p: npz(p, npy((10**13, *GREY), "|b1"), "mask.npy"), GREY, "for 10000000000000 images"),
    "all known": ("a.npz", lambda p: np.savez(p, mask=np.ones((8, 8), bool)), GREY, "nothing is left to draw"),
    "none known": ("a.png", lambda p: png(p), GREY, "no pixel as known"),
}


@pytest.mark.parametrize(
    ("option", "case"),
    [*(("--known", case) for case in REFUSED), *(("--mask", case) for case in MASKS)],
    ids=lambda value: value,
)
def test_files_that_are_refused(option: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, make, shape, words = (REFUSED if option == "--known" else MASKS)[case]
    make(tmp_path / name)
    np.savez(tmp_path / "good.npz", images=np.zeros((1, *shape), np.uint8), mask=LEVEL > 9)
    paths = {"--known": "good.npz", "--mask": "good.npz", option: name}
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            read_inpainting(paths["--known"], paths["--mask"], None, 4, shape, 17)
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{option} {name}") and words in message and "\n" not in message, message
    assert used < 3_000_000 and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (picture("L"), GREY),
        (picture("RGB"), GREY),
        (picture("RGB"), COLOUR),
        (lambda path: Image.fromarray(np.dstack([LEVEL] * 3 + [np.full_like(LEVEL, 255)])).save(path), COLOUR),
        (lambda path: Image.fromarray(np.dstack([LEVEL] * 3)).convert("P", palette=Image.Palette.ADAPTIVE).save(path), GREY),
    ],
)  # fmt: skip
def test_pictures_that_are_read(make: Files, shape: tuple[int, ...], tmp_path: Path) -> None:
    make(tmp_path / "a.png")
    assert torch.equal(read_images(tmp_path / "a.png", 4, shape, 256), torch.from_numpy(LEVEL).expand(1, *shape))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_that_are_read(save: Callable[..., None], tmp_path: Path) -> None:
    """Laid out by rows or by columns; and a bool whose byte is neither 0 nor 1 is true."""
    images = np.random.default_rng(0).integers(0, 17, (4, *COLOUR)).astype(np.uint8)
    strange = np.where(LEVEL > 9, np.uint8(7), np.uint8(0)).view(bool)
    save(tmp_path / "a.npz", images=np.asfortranarray(images), mask=strange, labels=np.arange(4))
    assert torch.equal(read_images(tmp_path / "a.npz", 4, COLOUR, 17), torch.from_numpy(images))
    mask = read_mask(tmp_path / "a.npz", 4, COLOUR)
    assert mask.shape == (1, 1, 8, 8) and int(mask.sum()) == 54 and torch.equal(mask & True, mask)
