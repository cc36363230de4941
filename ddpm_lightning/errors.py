"""The exceptions that the command line prints as one sentence, and the checks of a single argument.

Where a docstring gives the range of an argument, any other value raises InputError, in ``networks`` ValueError.
"""

__all__ = ["InputError", "RunError", "at_least", "positive"]


class InputError(ValueError):
    """Bad input. The message says what to do; the command line prints it alone (status 2).

    A message about one argument begins with ``NAME = VALUE``. From that the command line makes the option.
    """


class RunError(RuntimeError):
    """A run that cannot go on, whatever was put in: the disk is full, the loss is NaN. The message says what is left
    and what to do; the command line prints it alone (status 1)."""


def at_least(least: int, why: str = "", **arguments: int) -> None:
    """Refuse whole numbers, given by name, that are below ``least``. ``why`` is added to the message."""
    for name, value in arguments.items():
        if value < least:
            raise InputError(f"{name} = {value} must be {least} or more" + (f": {why}" if why else ""))


def positive(why: str = "", **arguments: float) -> None:
    """Refuse numbers, given by name, that are not positive and finite. ``why`` is added to the message."""
    for name, value in arguments.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name} = {value:g} must be positive and finite" + (f": {why}" if why else ""))
