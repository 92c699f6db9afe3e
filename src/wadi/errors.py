"""What is told to the user in one line."""

import warnings


class WadiError(Exception):
    """A mistake of the user or a failure of the surroundings, in one line that says what to do.

    The command line prints the line without a traceback and exits with 2.
    """


class WadiWarning(UserWarning):
    """Something unusual that the user should know, and that may be right. See `tell`."""


def tell(message: str) -> None:
    """Tell something unusual in one line: a `WadiWarning`, which the command line prints to stderr."""
    warnings.warn(message, WadiWarning, stacklevel=3)
