"""Where the real MNIST files are, and stand-ins for them: right headers and sizes, zeros for pixels and labels."""

import os
import struct
from pathlib import Path

import pytest

__all__ = ["DATA_DIR", "FILES", "real_mnist", "write_idx", "write_mnist"]

FILES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}

DATA_DIR = Path(os.environ.get("DDPM_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))

real_mnist = pytest.mark.skipif(
    not all((DATA_DIR / "MNIST" / "raw" / name).exists() for name in FILES),
    reason=f"no MNIST files in {DATA_DIR}/MNIST/raw: set DDPM_DATA_DIR to the folder that holds MNIST/raw",
)


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
