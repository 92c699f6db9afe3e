"""Tables between `<!-- table: NAME -->` and `<!-- /table -->`, in pages otherwise written by hand."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from wadi.errors import WadiError

_MARKER = re.compile(r"<!-- table: (\S+) -->\n|<!-- /table -->")


def find_tables(page: str, path: Path, known: Collection[str]) -> dict[str, tuple[int, int]]:
    """Where the content of each table begins and ends.

    Args:
        page: its text.
        path: its file, for messages.
        known: names of tables.

    Raises:
        WadiError: a marker is unknown, doubled, or not closed.
    """
    places: dict[str, tuple[int, int]] = {}
    name, start = None, 0
    for marker in _MARKER.finditer(page):
        opened = marker[1]
        line = page.count("\n", 0, marker.start()) + 1
        if (opened is None) == (name is None):
            wrong = "a table that is not open" if opened is None else f"a table inside of {name}"
            raise WadiError(f"{path}: line {line}: {'closes' if opened is None else 'opens'} {wrong}")
        if opened is None:
            places[name], name = (start, marker.start()), None
        elif opened in places:
            raise WadiError(f"{path}: line {line}: the table {opened} was there before")
        elif opened not in known:
            raise WadiError(f"{path}: line {line}: no table {opened!r}; known are {', '.join(known)}")
        else:
            name, start = opened, marker.end()
    if name is not None:
        raise WadiError(f"{path}: the table {name} is not closed; put <!-- /table --> below it")
    return places


def with_tables(page: str, places: Mapping[str, tuple[int, int]], blocks: Mapping[str, str]) -> str:
    """A page with other contents in the places of some of its tables."""
    for name in sorted(blocks, key=lambda name: -places[name][0]):  # from the end: places stay what they are
        start, end = places[name]
        page = page[:start] + blocks[name] + page[end:]
    return page


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
