"""Show the progress of long work: a bar on a terminal or in a notebook, otherwise a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from tqdm import auto, std

SHORTEST, LONGEST = 10.0, 60.0
"""Shortest and longest time between two lines in seconds; otherwise it is a twentieth of the time so far."""

_COUNTED = (
    "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f}%), {elapsed} so far, {remaining} left, {rate_fmt}{postfix}"
)
_SHARE = "{desc}: {percentage:.0f}%, {elapsed} so far, {remaining} left{postfix}"


def progress(*args: Any, **options: Any) -> std.tqdm:
    """A `tqdm` that also suits log files, where a bar would write thousands of carriage returns.

    If standard error is not a terminal, it prints whole lines: one at the start (with ``leave=False`` only
    after `SHORTEST` seconds), then one every 10 to 60 seconds, and one at the end. Only the first of several
    processes prints.

    Args:
        *args: as in tqdm.
        **options: as in tqdm. A `bar_format` is for terminals only; lines then show the share that is done.
    """
    options["disable"] = bool(options.get("disable")) or not _first_process()
    in_notebook = auto.notebook_tqdm is not std.tqdm
    if in_notebook or options.get("file", sys.stderr).isatty():
        return auto.tqdm(*args, **options)
    return _Lines(*args, **options)


def _first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


class _Lines(std.tqdm):
    def __init__(self, *args: Any, **options: Any) -> None:
        self._due = 0.0 if options.get("leave", True) else time.monotonic() + SHORTEST
        self._last: float | None = None  # what the last line said is done
        options["bar_format"] = _SHARE if options.get("bar_format") else _COUNTED
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line if one is due; tqdm calls this whenever a bar would be drawn anew."""
        now = time.monotonic()
        if msg is None and now >= self._due:
            elapsed = self.format_dict["elapsed"]
            self._due = now + min(LONGEST, max(SHORTEST, elapsed / 20))
            self._last = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Leave the lines where they are; a bar would make room for a message."""

    def close(self) -> None:
        """Print the last line."""
        if not self.disable and self._last != self.n and (self.leave or self._last is not None):
            self._due = 0.0
            self.display()
        self.leave = False  # or tqdm would end a bar that is not there
        super().close()
