"""A function with typed arguments as a command line: its docstring is the help text, its arguments are the options."""

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from docstring_parser import parse
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from ddpm_lightning.errors import InputError
from ddpm_lightning.failures import end
from ddpm_lightning.numbers import check_numbers
from ddpm_lightning.own_code import failure_in_own_code, find_own_modules

__all__ = ["call", "own_error", "run_script"]

_PLACED = {"run": "RUN", "project": "PROJECT"}  # arguments that are given by their place
_UNREADABLE = re.compile(r'Parser key "(\w+)".*(?:Got|Given) value: (.*)', re.DOTALL)


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A description line by line as it is written, and defaults but no types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return str(action.help) if hidden or action.required else f"{action.help} (default: {action.default})"


def call(function: Callable[..., Any], args: list[str], prog: str, description: str | None = None) -> int:
    """Call a function with the arguments that a command line gives it, and return the number that it returns, or 0.

    An argument ``run`` or ``project`` is given by its place, a list as several values, a bool as a switch, any other as
    ``--name``. An argument that is a dataclass has an option for each of its fields. The docstring describes every
    argument; what it says before them is the help's first part, if no ``description`` is given.

    Raises:
        InputError: an option that there is not, one that is missing, a value that cannot be read; the function's own,
            with the option for the argument.
    """
    doc = parse(inspect.getdoc(function) or "")
    text = description or "\n\n".join(filter(None, (doc.short_description, doc.long_description)))
    # abbreviations would turn a misspelt option into another one
    parser = ArgumentParser(prog=prog, description=text, formatter_class=_Help, allow_abbrev=False, exit_on_error=False)
    types: dict[str, Any] = {}
    signature = inspect.signature(function, eval_str=True).parameters
    parts: dict[str, Any] = {name: each.annotation for name, each in signature.items() if is_dataclass(each.annotation)}
    for part in (function, *parts.values()):
        helps = {param.arg_name: param.description for param in parse(inspect.getdoc(part) or "").params}
        for name, parameter in inspect.signature(part, eval_str=True).parameters.items():
            if name not in parts:
                types[name] = _add_option(parser, parameter, helps[name] or "")
    try:
        options = vars(parser.instantiate(parser.parse_args(args)))
        check_numbers(options)
        made = {
            name: kind(**{field.name: options.pop(field.name) for field in fields(kind)})
            for name, kind in parts.items()
        }
        status = function(**made, **options)
    except argparse.ArgumentError as error:
        raise InputError(failure_in_own_code(error) or _one_line(str(error), types)) from None
    except ValueError as error:
        cause = own_error(error)
        if cause is None:
            raise
        # "n = 3 must be ..." says which option it was
        name, equals, rest = str(cause).partition(" = ")
        raise InputError(f"--{name} {rest}" if equals and name in types else str(cause)) from error
    return status if isinstance(status, int) else 0


def own_error(error: BaseException) -> InputError | None:
    """What a part says of its arguments. jsonargparse wraps this into what it tried with them."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _add_option(parser: ArgumentParser, parameter: inspect.Parameter, text: str) -> Any:
    name, kind = parameter.name, parameter.annotation
    if name in _PLACED:
        parser.add_argument(name, metavar=_PLACED[name], type=kind, help=text)
        return kind
    missing = parameter.default is parameter.empty
    options: dict[str, Any] = {"required": True} if missing else {"default": parameter.default}
    for each in (kind, *get_args(kind)):
        if get_origin(each) is list:
            kind, options["nargs"] = get_args(each)[0], "+"
    options |= {"action": "store_true"} if kind is bool else {"type": kind}
    parser.add_argument(f"--{name}", help=text, **options)
    return kind


def run_script(function: Callable[..., Any], description: str | None) -> None:
    """Call a script's function with the words of the command line, and exit: 2 and one line for bad input."""
    prog = Path(sys.argv[0]).name
    find_own_modules()
    try:
        status = call(function, sys.argv[1:], prog, description)
    except (Exception, KeyboardInterrupt) as error:
        status = end(error, prog.removesuffix(".py"))
    sys.exit(status)


def _one_line(message: str, types: dict[str, Any]) -> str:
    if found := _UNREADABLE.search(message):
        name, value = found.groups()
        if value.startswith("NestedArg"):
            return f"--{name}.{value.split(chr(39))[1]} belongs to a class: give --{name} CLASS before it"
        kind = types[name]
        wanted = " or ".join(map(str, get_args(kind))) if "Literal" in str(kind) else getattr(kind, "__name__", kind)
        return f"--{name} {value} cannot be read as {wanted}"
    _, _, names = message.partition("arguments are required: ")
    if names:
        return "missing: " + ", ".join(_PLACED.get(name, f"--{name}") for name in names.split(", "))
    return " ".join(message.split())
