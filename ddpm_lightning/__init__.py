"""Denoising diffusion with PyTorch Lightning: the noise-MSE loss and the full bound, term by term."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("ddpm-lightning")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
