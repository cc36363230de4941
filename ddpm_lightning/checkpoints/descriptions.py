"""Plain-data descriptions of parts, so that a checkpoint can name what it was made of without pickling it."""

from collections.abc import Mapping
from functools import partial
from inspect import Parameter, signature
from typing import Any

__all__ = ["describe"]

_PLAIN = (bool, int, float, str, type(None))


def describe(value: Any) -> Any:
    """``value`` as the plain data that the command line would have had for it.

    Numbers, strings, and lists, tuples and mappings of them stay. Any other object becomes
    ``{"class_path": ..., "init_args": {...}}``, read from the attributes that carry the names of its constructor's
    arguments; a class or a ``functools.partial`` of one becomes the same, for parts that are completed later.

    Raises:
        TypeError: an object that does not keep its constructor's arguments, a function, a local class.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, partial):
        if value.args or not isinstance(value.func, type):
            raise TypeError(f"cannot describe {value}: give a class and named arguments")
        return _described(value.func, {key: describe(item) for key, item in value.keywords.items()})
    if isinstance(value, type):
        return _described(value, {})
    return _described(type(value), {name: describe(_argument(value, name)) for name in _init_arguments(type(value))})


def _described(cls: type, init_args: dict[str, Any]) -> dict[str, Any]:
    if "<locals>" in cls.__qualname__ or cls.__module__ == "builtins":
        raise TypeError(f"cannot describe {cls.__qualname__}: it cannot be imported by its name")
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args}


def _init_arguments(cls: type) -> list[str]:
    try:
        parameters = signature(cls).parameters.values()
    except ValueError:
        raise TypeError(f"cannot describe {cls.__qualname__}: its constructor has no signature") from None
    if any(p.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for p in parameters):
        raise TypeError(f"cannot describe {cls.__qualname__}: its constructor takes *args or **kwargs")
    return [p.name for p in parameters]


def _argument(value: object, name: str) -> Any:
    try:
        return getattr(value, name)
    except AttributeError:
        raise TypeError(
            f"cannot describe {type(value).__qualname__}: it does not keep its argument {name!r} as an attribute"
        ) from None
