"""Configuration files: YAML that may name the file it changes, read and checked as a whole."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import get_loader, set_loader

from ddpm_lightning.errors import InputError

__all__ = [
    "PARSER_MODE", "ConfigurationError", "configuration_files", "merge", "read", "read_text", "shipped",
    "with_shipped",
]  # fmt: skip

PARSER_MODE = "yaml_extends"
"""The name under which jsonargparse finds this YAML."""

_SHIPPED = Path(__file__).parent / "configs"
_DEEPEST = 50
_LARGEST = 100_000


class ConfigurationError(InputError, yaml.YAMLError):
    """A configuration that cannot be read: a sentence for the user, and what jsonargparse expects of a loader."""


def merge(base: Any, overlay: Any) -> Any:
    """Overlay on base, key by key. A part of another class, like a list, replaces the base's as a whole; ``NAME+``
    appends to the base's list of that name."""
    if not (isinstance(base, dict) and isinstance(overlay, dict)):
        return overlay
    if "class_path" in overlay and overlay["class_path"] != base.get("class_path"):
        return overlay
    merged = dict(base)
    for key, value in overlay.items():
        name = key.removesuffix("+") if isinstance(key, str) else key
        if name != key and isinstance(base.get(name), list) and isinstance(value, list):
            merged[name] = [*base[name], *value]
        else:
            merged[key] = merge(base.get(key), value)
    return merged


def shipped(name: str) -> Path | None:
    """The configuration of that name that comes with the package, if any: ``digits``, ``digits.yaml`` and
    ``configs/digits.yaml`` are one."""
    return _all_shipped().get(name.removeprefix("configs/").removesuffix(".yaml"))


def _all_shipped() -> dict[str, Path]:
    return {path.relative_to(_SHIPPED).with_suffix("").as_posix(): path for path in sorted(_SHIPPED.rglob("*.yaml"))}


def with_shipped(args: list[str]) -> list[str]:
    """The words of a command line, with a path for each shipped configuration that ``-c`` or ``--config`` names where
    there is no file of that name."""
    placed = []
    for before, word in pairwise(["", *args]):
        option, _, value = word.partition("=") if word.startswith("-") else ("", "", word)
        names = (option or before) in ("-c", "--config")
        ours = shipped(value) if names else None
        placed.append("=".join(filter(None, (option, str(ours)))) if ours and not Path(value).is_file() else word)
    return placed


def read(path: str | Path) -> dict[str, Any]:
    """A configuration file, with the files that it extends.

    ``extends: other.yaml`` names the configuration that a file changes, beside itself or shipped (:func:`shipped`).

    Raises:
        ConfigurationError: no such file, one that is not YAML in UTF-8 or no mapping, one that extends itself, a key
            that is there twice. The message names the file, and the line where there is one.
    """
    return _read(Path(path), ())


def _read(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    loaded = _load_file(path, extended_by)
    if not isinstance(loaded, dict):
        what = "is empty" if loaded is None else f"holds a {type(loaded).__name__}"
        raise ConfigurationError(f"the configuration {path} {what}: it must map names of options to values")
    return _extended(loaded, path.parent, (*extended_by, path.expanduser().resolve()))


def _load_file(path: Path, extended_by: tuple[Path, ...] = ()) -> Any:
    try:
        text = path.expanduser().read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        asked = f" (which {extended_by[-1]} extends)" if extended_by else ""
        is_name = not path.suffix and path.parent in (Path(), Path("overlays"))
        known = f"; by name there are {', '.join(_all_shipped())}" if is_name else ""
        raise ConfigurationError(f"the configuration {path}{asked} cannot be read: {what}{known}") from None
    return _load(text, f"{path}")


def _extended(loaded: dict[str, Any], folder: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    if "extends" not in loaded:
        return loaded
    name = loaded.pop("extends")
    who = extended_by[-1] if extended_by else "a configuration"
    if not (isinstance(name, str) and name.strip()):
        raise ConfigurationError(f"{who}: extends must be the name of one file")
    base = folder / name
    if (ours := shipped(name)) and not base.is_file():
        base = ours
    if base.expanduser().resolve() in extended_by:
        circle = " extends ".join(path.name for path in (*extended_by, base))
        raise ConfigurationError(f"{who}: extends: {name} leads in a circle: {circle}")
    return merge(_read(base, extended_by), loaded)


def read_text(text: str) -> Any:
    """The value that a text of YAML stands for, with the file that it extends, in the current folder.

    Raises:
        ConfigurationError: a file that it extends, as :func:`read`.
        YAMLError: the text itself.
    """
    try:
        loaded = _load(text)
    except ConfigurationError as error:
        raise yaml.YAMLError(str(error)) from None
    return _extended(loaded, Path(), ()) if isinstance(loaded, dict) else loaded


# jsonargparse would take a second parameter for one of its own
set_loader(PARSER_MODE, lambda text: read_text(text), exceptions=(yaml.YAMLError,))


def _load(text: str, name: str = "") -> Any:
    try:
        _check(text)
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(_sentence(error, name)) from None
    except (ValueError, RecursionError) as error:  # of a date or a number that there is not
        raise ConfigurationError(f"the configuration {name} is no YAML: {error}") from None


def _sentence(error: yaml.YAMLError, name: str) -> str:
    where = f"the configuration {name}".rstrip()
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{where} is no YAML: {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    line = f", line {mark.line + 1}" if mark else ""
    return f"{where}{line}: {' '.join(filter(None, (error.context, error.problem)))}"


def _check(text: str) -> None:
    """Refuse what YAML allows and nobody means: a key twice, endless nesting, aliases that unfold without end."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"is nested more than {_DEEPEST} deep", problem_mark=cast(Any, event.start_mark)
            )
    root = yaml.compose(text, Loader=loader)
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        """Number of values, aliases unfolded."""
        if id(node) not in sizes:
            sizes[id(node)] = _LARGEST  # an alias of a value within itself has no end
            seen = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} is there twice", problem_mark=cast(Any, key.start_mark)
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            sizes[id(node)] = min(1 + sum(map(size, _inside(node))), _LARGEST)
        if sizes[id(node)] >= _LARGEST:
            raise yaml.MarkedYAMLError(
                problem=f"stands for {_LARGEST} values or more, with its aliases",
                problem_mark=cast(Any, node.start_mark),
            )
        return sizes[id(node)]

    if root is not None:
        size(root)


def _inside(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        yield from (each for pair in node.value for each in pair)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def configuration_files(args: list[str]) -> Iterator[dict[str, Any]]:
    """The configurations that a command line names by ``-c`` or ``--config``, in order; those written in it too.

    Raises:
        ConfigurationError: as :func:`read`; also for the file of a part, as in ``--model part.yaml``.
    """
    for option, value in pairwise([word for each in args for word in each.split("=", 1)]):
        if option in ("-c", "--config"):
            written = any(sign in value for sign in ("{", "\n", ": ")) and not Path(value).exists()
            loaded = read_text(value) if written else read(value)
            if isinstance(loaded, dict):
                yield loaded
        elif option.startswith("--") and value.endswith((".yaml", ".yml")) and Path(value).is_file():
            part = _load_file(Path(value))
            if isinstance(part, dict):
                _extended(part, Path(value).parent, (Path(value).resolve(),))
