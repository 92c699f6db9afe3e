"""Errors and warnings that the user sees as one line."""

import warnings


class WadiError(Exception):
    """A mistake of the user, or a failure of disk, network or device. One line says what to do.

    The command line prints it without a traceback and exits with 2.
    """


class WadiWarning(UserWarning):
    """Something unusual that may be right, and that the user should know. See `tell`."""


def tell(message: str) -> None:
    """Warn about something unusual in one line. The command line prints this `WadiWarning` to stderr."""
    warnings.warn(message, WadiWarning, stacklevel=3)
