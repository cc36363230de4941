"""Stand-ins for the four MNIST files: right headers and sizes, sparse zeros for the pixels and the labels."""

import struct
from pathlib import Path

__all__ = ["FILES", "write_idx", "write_mnist"]

FILES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}


def write_idx(path: Path, shape: tuple[int, ...], *, type_code: int = 0x08, missing_bytes: int = 0) -> None:
    """An idx file of uint8 zeros that ends ``missing_bytes`` too early."""
    header = struct.pack(f">{1 + len(shape)}I", type_code * 256 + len(shape), *shape)
    size = len(header) - missing_bytes
    pixels = 1
    for length in shape:
        pixels *= length
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size + pixels)


def write_mnist(root: Path) -> Path:
    """All four files in ``root/MNIST/raw``, the folder that is returned."""
    raw = root / "MNIST" / "raw"
    for name, shape in FILES.items():
        write_idx(raw / name, shape)
    return raw
