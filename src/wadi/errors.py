"""The one exception of a user's mistake."""


class WadiError(Exception):
    """A mistake of the user or of the surroundings, told in one line: what, where, and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
