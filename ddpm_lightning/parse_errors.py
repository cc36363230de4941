"""What jsonargparse says of a command line that it cannot read, in one sentence that names the option."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from pkgutil import resolve_name

from ddpm_lightning.checkpoints.descriptions import parameters_of

__all__ = ["sentence"]

_ROOMS = ("schedules", "networks", "process", "objectives", "samplers", "data", "callbacks", "training.optimizers")
_LIBRARIES = {
    "optimizer": "torch.optim",
    "lr_scheduler": "torch.optim.lr_scheduler",
    "callbacks": "lightning.pytorch.callbacks",
}
"""Where classes for an option are, beside those of this package."""


def sentence(message: str, options: Iterable[str], command: str) -> str:
    """One sentence for a message of the parser.

    Args:
        message: the parser's, of any number of lines.
        options: the options that there are.
        command: the command that was asked for, for what to do where no configuration was given.
    """
    lines = [line.strip(" -\t") for line in message.splitlines() if line.strip(" -\t")]
    text = " ".join(lines)
    if found := re.match(r"unrecognized arguments: (\S+)", text):
        option = found[1].split("=")[0]
        return f"there is no option {option}{_meant(option, options)}"
    if found := re.match(r"the following arguments are required: (.*)", text):
        missing = [name.strip().removeprefix(f"{command}.") for name in found[1].split(",")]
        if "data" in missing and len(missing) > 2:
            return f"nothing says what to work on: ddpm {command} -c configs/mnist.yaml, or ddpm {command} RUN"
        return "missing: " + ", ".join(f"--{name}" for name in missing)
    if found := re.match(r"""argument (\S+): ignored explicit argument ['"](.*)['"]""", text):
        return f"{found[1]} takes no value"
    if not (found := re.match(r'Parser key "([^"]+)":', text)):
        return text
    option, reasons = f"--{found[1]}", text[found.end() :].strip()
    while inner := re.search(r'Parser key "([^"]+)": ?(.*)', reasons):
        option, reasons = f"{option}.{inner[1]}", inner[2]
    # of an argument of a part: what jsonargparse says of the whole part
    reasons = reasons.partition(" Expected a <class 'NoneType'> Given value type: <class 'jsonargparse._util.Nest")[0]
    reasons, _, part = reasons.partition(". Got value: Namespace(")
    if wrong := re.match(
        r"Expected an? (?:<class '(\w+)'>|typing.Literal\[(.*?)\])\.?.*?(?:Got|Given) value: (.*)", reasons
    ):
        return f"{option} {wrong[3]} cannot be read as {wrong[1] or _types(wrong[2])}"
    if wrong := re.search(r"Option '([^']+)' is not accepted", reasons):
        owner = re.search(r"class_path[ =]'([^']+)'", reasons + part)
        return f"{option}.{wrong[1]}: {_arguments(owner[1] if owner else '', wrong[1])}"
    if wrong := re.search(r"Subtypes: \[(<class '(?:int|float)'>.*?)\] Errors: .*? Given value: (.*)", reasons):
        return f"{option} {wrong[2]} cannot be read as {_types(wrong[1])}"
    if wrong := re.search(r"Expected a dot import path string: (\S+)", reasons):
        known = _classes(option)
        if wrong[1] in known:
            return f"{option} {wrong[1]}: {wrong[1]} is no class for this option"
        return f"{option} {wrong[1]}: there is no such class{_meant(wrong[1], known)}"
    if wrong := re.search(r"class_path '([^']+)':? ?(.*?)(?: Given value| Got value|$)", reasons):
        return f"{option} {wrong[1]}: {wrong[2] or reasons}"
    if wrong := re.match(r"Does not validate .*?Subtypes: \[(.*?)\] Errors: .* Given value: (.*)", reasons):
        return f"{option} {wrong[2]} cannot be read as {_types(wrong[1])}"
    return f"{option}: {reasons}"


def _types(listed: str) -> str:
    """``<class 'float'>, list[float]`` in words."""
    names = re.sub(r"<class '([\w.]+)'>|typing\.Literal\[(.*?)\]", r"\1\2", listed)
    return " or ".join(dict.fromkeys(names.replace("NoneType", "null").replace("'", "").split(", ")))


def _meant(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest, whatever its capitals."""
    words = {each.lower(): each for each in known}
    near = get_close_matches(word.lower(), list(words), 1)
    return f": did you mean {words[near[0]]}?" if near else ""


def _classes(option: str) -> list[str]:
    """Names of this package's classes, and of a library's where it has some for this option."""
    library = _LIBRARIES.get(option.rpartition(".")[2])
    rooms = map(import_module, [*(f"ddpm_lightning.{room}" for room in _ROOMS), *([library] if library else [])])
    return [name for room in rooms for name in room.__all__ if isinstance(getattr(room, name), type)]


def _arguments(class_path: str, wrong: str) -> str:
    try:
        # the weights of an optimiser and the optimiser of a schedule are no options
        known = [name for name in parameters_of(resolve_name(class_path)) if name not in ("params", "optimizer")]
    except (ValueError, ImportError, AttributeError, TypeError):
        return "there is no such argument"
    name = class_path.rpartition(".")[2]
    only = f": it has {', '.join(known) or 'none'}"
    return f"{name} has no such argument{_meant(wrong, known) or only}"
