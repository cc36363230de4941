"""The exceptions that the command line prints as one sentence."""

__all__ = ["InputError", "RunError"]


class InputError(ValueError):
    """Bad input. The message names the option and says what to do; the command line prints it alone (status 2)."""


class RunError(RuntimeError):
    """A run that cannot go on, whatever was put in: the disk is full, the loss is not a number. The message says what
    is left and what to do; the command line prints it alone (status 1)."""
