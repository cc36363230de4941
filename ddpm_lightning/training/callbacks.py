"""The callbacks under the names that configurations saved before version 0.2 know them by."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    # by name only, because callbacks stand above training
    return getattr(import_module("ddpm_lightning.callbacks"), name)
