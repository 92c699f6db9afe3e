"""What several tests do with files."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file that holds an object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, without its seconds, which no two runs have in common."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def full_disk(*arguments: Any, **options: Any) -> None:
    """Stands for a function that writes, where the disk is full."""
    raise OSError(errno.ENOSPC, "No space left on device")
