from collections.abc import Mapping

from torch import Tensor

__all__ = ["check_conditions", "refuse_conditions"]

_OPTIONS = {"label": "num_classes", "vector": "vector_size", "field": "field_channels"}


def refuse_conditions(why: str, given: Mapping[str, Tensor | None]) -> None:
    """Raise a ValueError that begins with ``why`` where a condition is given."""
    for name in (name for name, value in given.items() if value is not None):
        raise ValueError(f"{why}: leave {name} out, or use UNet({_OPTIONS.get(name, name)}=...)")


def check_conditions(given: Mapping[str, Tensor | None], shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Raise a ValueError for a condition that the network has none of (its shape is None), or of another shape. No
    value is read, so a GPU is not waited for."""
    for name, value in given.items():
        shape = shapes[name]
        if value is not None and shape is None:
            raise ValueError(f"a {name} was given to a network without: leave it out, or set {_OPTIONS[name]}")
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"expected {name} of shape {list(shape or ())}, got {list(value.shape)}")
