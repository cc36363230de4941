"""Denoising diffusion with PyTorch Lightning: the noise-MSE loss and the full bound, term by term."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm_lightning.pretrained import load_pretrained, pretrained_names

__all__ = ["__version__", "load_pretrained", "pretrained_names"]

try:
    __version__ = version("ddpm-lightning")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for, since ``ddpm --help`` imports this file."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ddpm_lightning import pretrained

    return getattr(pretrained, name)
