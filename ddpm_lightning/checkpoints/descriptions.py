"""Plain-data descriptions of parts: a checkpoint names what it was made of without pickling it, and loading it makes
these parts again without running code that the checkpoint holds or names.
"""

import importlib
import os
import sys
from collections import abc
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from inspect import Parameter, signature
from types import FunctionType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ddpm_lightning.errors import InputError

__all__ = ["describe", "instantiate_arguments", "parameters_of", "trusted_class"]

# where a class must be defined; DDPM_TRUSTED adds to it
_TRUSTED = (
    "ddpm_lightning.networks",
    "ddpm_lightning.schedules",
    "ddpm_lightning.process",
    "ddpm_lightning.objectives",
    "ddpm_lightning.training.optimizers",
    "torch.nn.modules",
    "torch.optim",
)
_LARGEST = 10**7  # of a whole number that a part is made with: sizes beyond would fill the memory
_HUGE = 10**300  # less than the largest float
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
    names = _init_arguments(type(value))
    if lacking := [name for name in names if not hasattr(value, name)]:
        of = type(value).__qualname__
        raise TypeError(f"cannot describe {of}: it does not keep its argument {lacking[0]!r} as an attribute")
    return _described(type(value), {name: describe(getattr(value, name)) for name in names})


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


def instantiate_arguments(
    function: Callable[..., Any],
    descriptions: Any,
    place: str,
    given: Mapping[str, Any] | None = None,
    depth: int = 0,
    left_open: int = 0,
) -> dict[str, Any]:
    """The named arguments of a function or class, each made as its annotation says. Only trusted modules are imported.

    An argument annotated with a class takes ``{"class_path": ..., "init_args": {...}}`` of a subclass that
    :func:`trusted_class` finds. ``Callable[[...], C]`` takes the same for a subclass of C, and becomes a partial of it.

    Args:
        function: the function or class.
        descriptions: plain data by name, of :func:`describe` or of the command line.
        place: name of the place, for messages.
        given: arguments that need no description, and beat those that have one.
        depth: in how many others the descriptions lie.
        left_open: so many of the first arguments are given later.

    Raises:
        InputError: a class that is not trusted or does not fit its place, an unknown or missing argument, a value of
            another type.
    """
    made = dict(given or {})
    known = dict(list(parameters_of(function).items())[left_open:])
    for name in (*descriptions, *made):
        if name not in known:
            raise InputError(f"{place} is refused: {_name(function)} has no argument {_shown(name)}")
        if name not in made:
            made[name] = _value(descriptions[name], known[name].annotation, f"{place}.{name}", depth)
    missing = [name for name, parameter in known.items() if parameter.default is Parameter.empty and name not in made]
    if missing:
        raise InputError(f"{place}.{missing[0]} is missing: {_name(function)} needs it")
    return made


def trusted_class(class_path: Any, place: str) -> type:
    """The class of that name, if a trusted package defines it (:func:`trusted_part`)."""
    return cast(type, trusted_part(class_path, place))


def trusted_part(class_path: Any, place: str, kinds: type | tuple[type, ...] = type) -> Any:
    """The class of that name, or what ``kinds`` allow, if a trusted package defines it.

    Trusted are this package's networks, schedules, process and objectives, ``torch.nn``, ``torch.optim``, and what the
    variable ``DDPM_TRUSTED`` names: packages or modules, separated by commas. Of these only, functions too.

    Raises:
        InputError: there is no such class, or its package is not trusted.
    """
    own = tuple(name.strip() for name in os.environ.get("DDPM_TRUSTED", "").split(",") if name.strip())
    refused = f"{place} names {_shown(class_path)}, which is refused"

    def trust(name: str) -> str:
        return f"DDPM_TRUSTED={_shown(name.partition('.')[0])}"

    if not isinstance(class_path, str) or not all(part.isidentifier() for part in class_path.split(".")):
        raise InputError(f"{refused}: it is no name of a class")
    module, _, name = class_path.rpartition(".")
    # a __main__ would run
    if not _within(module, (*_TRUSTED, "torch.nn", *own)) or ("__" in module and module not in own):
        raise InputError(f"{refused}, since importing it runs its code; if you trust it: {trust(class_path)}")
    try:
        home = importlib.import_module(module)
        found: Any = vars(home).get(name)
        if found is None and _within(module, own):
            found = getattr(home, name, None)  # a package may import its classes when they are asked for
    except (Exception, SystemExit) as error:
        raise InputError(f"{refused}: {module} cannot be imported ({_first_line(error)})") from error
    # functions of libraries are no parts
    if not isinstance(found, kinds) or not (isinstance(found, type) or _within(found.__module__, own)):
        raise InputError(f"{refused}: it is no {'class' if kinds is type else 'class or function'}")
    # a module also holds what it has imported from elsewhere
    if not _within(found.__module__, (*_TRUSTED, *own)):
        raise InputError(f"{refused}: {found.__module__} defines it; if you trust that: {trust(found.__module__)}")
    if getattr(sys.modules.get(found.__module__), cast(Any, found).__qualname__, None) is not found:
        raise InputError(f"{refused}: it is not what {found.__module__} defines")
    return found


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _shown(value: Any) -> str:
    """A short form of any value, for messages."""
    if isinstance(value, str):
        return value if value.isprintable() and 0 < len(value) <= 80 else repr(value[:80])
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() < 64):
        return repr(value)
    return f"a {type(value).__name__}"


def _name(expected: Any) -> str:
    return expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]


def _value(value: Any, expected: Any, place: str, depth: int) -> Any:
    origin, options = get_origin(expected), get_args(expected)
    collection = origin or expected
    _check_depth(place, depth)
    if expected in (Any, object) or isinstance(expected, TypeVar):
        return _plain(value, place, depth)
    if collection in (Union, UnionType):
        return _one_of(value, options, place, depth)
    if origin is Literal:
        if any(type(value) is type(option) and value == option for option in options):
            return value
    elif expected in (bool, int, str, NoneType):
        if type(value) is expected:
            return _plain(value, place, depth)
    elif expected is float:
        if type(value) is float or (type(value) is int and abs(value) < _HUGE):
            return float(value)
    elif collection is abc.Callable:
        if isinstance(value, str):
            return trusted_part(value, place, FunctionType)
        if isinstance(value, Mapping) and len(options) == 2 and isinstance(options[0], list):
            return _part(value, options[1], place, depth, len(options[0]))
    elif collection in (list, tuple, abc.Sequence, abc.Iterable, abc.Collection):
        if isinstance(value, list | tuple):
            return _items(value, collection, options, place, depth)
    elif collection in (dict, abc.Mapping):
        if isinstance(value, Mapping) and not options:
            return _plain(value, place, depth)
        if isinstance(value, Mapping):
            of_key, of_item = options
            return {_value(k, of_key, place, depth + 1): _value(v, of_item, place, depth + 1) for k, v in value.items()}
    elif isinstance(expected, type) and isinstance(value, Mapping):
        return _part(value, expected, place, depth, None)
    raise InputError(f"{place} is refused: {_shown(value)} is no {_name(expected)}")


def _one_of(value: Any, options: tuple[Any, ...], place: str, depth: int) -> Any:
    """A value for a union of types: the first that it fits, its own before others."""
    if value is None and NoneType in options:
        return None
    *others, last = sorted((o for o in options if o is not NoneType), key=lambda option: option is not type(value))
    for option in others:
        with suppress(InputError):
            return _value(value, option, place, depth)
    return _value(value, last, place, depth)


def _items(value: Any, collection: Any, options: tuple[Any, ...], place: str, depth: int) -> Any:
    kinds = options
    if collection is not tuple or not options or options[-1] is Ellipsis:
        kinds = (options[0] if options else Any,) * len(value)
    if len(value) != len(kinds):
        raise InputError(f"{place} is refused: it has {len(value)} values instead of {len(kinds)}")
    places = (f"{place}[{i}]" for i in range(len(value)))
    items = [_value(item, kind, name, depth + 1) for item, kind, name in zip(value, kinds, places, strict=True)]
    return tuple(items) if collection is tuple else items


def _check_depth(place: str, depth: int) -> None:
    if depth > 32:
        raise InputError(f"{place} is refused: it is nested too deeply")


def _plain(value: Any, place: str, depth: int) -> Any:
    """Numbers, words, and lists and mappings of them, as they are."""
    _check_depth(place, depth)
    if type(value) is int and depth > 0 and abs(value) > _LARGEST:
        raise InputError(f"{place} is refused: {_shown(value)} is larger than any size of a part")
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list | tuple):
        items = [_plain(item, place, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Mapping) and "class_path" not in value:
        return {_plain(key, place, depth + 1): _plain(item, place, depth + 1) for key, item in value.items()}
    raise InputError(f"{place} is refused: {_shown(value)} is no plain data")


def _part(description: Mapping[Any, Any], expected: Any, place: str, depth: int, left_open: int | None) -> Any:
    """The object that a description names; with so many arguments left open, a partial."""
    if strange := [key for key in description if key not in ("class_path", "init_args", "dict_kwargs")]:
        raise InputError(f"{place} is refused: {_shown(strange[0])} does not belong there")
    if "class_path" not in description:
        raise InputError(f"{place} is refused: it names no class_path")
    kinds = type if left_open is None else (type, FunctionType)
    cls = trusted_part(description["class_path"], place, kinds)
    if isinstance(cls, FunctionType):
        return partial(cls, **_plain(description.get("init_args") or {}, place, depth))
    if not isinstance(expected, type) or not issubclass(cls, expected):
        raise InputError(f"{place} is refused: {cls.__name__} is no {_name(expected)}")
    described: dict[Any, Any] = {}
    for key in ("init_args", "dict_kwargs"):
        arguments = description.get(key) or {}
        if not isinstance(arguments, Mapping):
            raise InputError(f"{place} is refused: its {key} are {_shown(arguments)}")
        described.update(arguments)
    if left_open is not None:
        return partial(cls, **instantiate_arguments(cls, described, place, None, depth, left_open))
    made = instantiate_arguments(cls, described, place, None, depth + 1)
    try:
        return cls(**made)
    except Exception as error:
        raise InputError(f"{place} cannot be made: {cls.__name__}: {_first_line(error)}") from error


def parameters_of(function: Any) -> dict[str, Parameter]:
    """The named parameters with their annotations; of a class also those that its ``**kwargs`` hand on.

    A class may give the latter itself, as optimisers do with ``defaults``, so none of them must be described.
    """
    is_class = isinstance(function, type)
    makers = [vars(c)["__init__"] for c in function.__mro__ if "__init__" in vars(c)] if is_class else [function]
    known: dict[str, Parameter] = {}
    for maker in makers:
        parameters = list(signature(maker).parameters.values())[is_class:]
        try:
            hints = get_type_hints(maker)
        except (NameError, TypeError):
            hints = {}
        for p in parameters:
            if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
                if maker is not makers[0] and p.default is Parameter.empty:
                    p = p.replace(default=None)
                known.setdefault(p.name, p.replace(annotation=hints.get(p.name, Any)))
        if all(p.kind is not Parameter.VAR_KEYWORD for p in parameters):
            break
    return known
