"""A function with typed arguments as a command line: its docstring is the help text, its arguments are the options."""

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

from docstring_parser import parse
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from ddpm_lightning.errors import InputError

__all__ = ["call", "run_script"]

_UNREADABLE = re.compile(r'Parser key "(\w+)".*(?:Got|Given) value: (.*)', re.DOTALL)


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A description line by line as it is written, and defaults but no types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, False, argparse.SUPPRESS) and not action.required
        return f"{action.help} (default: {action.default})" if shown else str(action.help)


def call(function: Callable[..., int | None], args: list[str], prog: str, description: str | None = None) -> int:
    """Call a function with the arguments that a command line gives it.

    An argument ``run`` is given by its place, a list as several values, a bool as a switch, any other as ``--name``.

    Args:
        function: with annotations and a Google docstring, which describes every argument.
        args: the words of the command line.
        prog: the command's name in the help.
        description: the help's first part; None for what the docstring says before the arguments.

    Returns:
        What the function returns, 0 for None: the exit status.

    Raises:
        InputError: an option that there is not, one that is missing, a value that cannot be read; the function's own,
            with the option for the argument.
    """
    doc = parse(inspect.getdoc(function) or "")
    text = description or "\n\n".join(filter(None, (doc.short_description, doc.long_description)))
    # abbreviations would turn a misspelt option into another one
    parser = ArgumentParser(prog=prog, description=text, formatter_class=_Help, allow_abbrev=False, exit_on_error=False)
    types: dict[str, Any] = {}
    helps = {param.arg_name: param.description for param in doc.params}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        types[name] = kind = parameter.annotation
        options: dict[str, Any] = {"help": helps[name], "type": kind}
        if name != "run":
            missing = parameter.default is parameter.empty
            options |= {"required": True} if missing else {"default": parameter.default}
        if kind is bool:
            options["action"] = "store_true"
            del options["type"]
        for each in (kind, *get_args(kind)):
            if get_origin(each) is list:
                types[name] = get_args(each)[0]
                options |= {"type": types[name], "nargs": "+"}
        parser.add_argument(*(["run"] if name == "run" else [f"--{name}"]), **options)
    try:
        parsed = parser.instantiate(parser.parse_args(args))
    except argparse.ArgumentError as error:
        raise InputError(_one_line(str(error), types)) from None
    except ValueError as error:
        # jsonargparse wraps what a part says of its arguments into what it tried with them
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        raise InputError(str(cause or error)) from error
    try:
        return function(**parsed) or 0
    except InputError as error:
        # "n = 3 must be ..." says which option it was
        name, equals, rest = str(error).partition(" = ")
        raise InputError(f"--{name} {rest}" if equals and name in types else str(error)) from None


def run_script(function: Callable[..., int | None], description: str | None) -> None:
    """Call a script's function with the words of the command line, and exit: 2 and one line for bad input."""
    prog = Path(sys.argv[0]).name
    try:
        sys.exit(call(function, sys.argv[1:], prog, description))
    except InputError as error:
        print(f"{prog.removesuffix('.py')}: error: {error}", file=sys.stderr)
        sys.exit(2)


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
        return "missing: " + ", ".join("RUN" if name == "run" else f"--{name}" for name in names.split(", "))
    return " ".join(message.split())
