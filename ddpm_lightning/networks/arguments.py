"""Checks of a network's arguments, with messages as in ``errors``: networks import nothing else of the package."""

__all__ = ["at_least", "positive"]


def at_least(least: int, **arguments: int) -> None:
    """Refuse whole numbers, given by name, that are below ``least``, with a ValueError."""
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name} = {value} must be {least} or more")


def positive(**arguments: float) -> None:
    """Refuse numbers, given by name, that are not positive and finite, with a ValueError."""
    for name, value in arguments.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} = {value:g} must be positive and finite")
