"""The one collective that is needed beyond Lightning's and torchmetrics' own."""

from typing import TypeVar

import torch.distributed as dist

__all__ = ["gather_to_all"]

T = TypeVar("T")


def gather_to_all(value: T) -> list[T]:
    """Every process's ``value`` (picklable, on the CPU), in order of rank; one process gives ``[value]``."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return [v for v in values if v is not None]
