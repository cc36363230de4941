"""The one exception for input that a user can mend."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input. The message names the option and says what to do; the command line prints it alone."""
