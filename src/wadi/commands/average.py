"""`wadi average`: make one student of several."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro


def average(
    adapters: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    weights: tuple[float, ...] | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Write the mean of several students' adapters, as an adapter of the same size.

    The students must have been trained on from one student (--student-adapter), with other seeds or options:
    the mean is then often better than each of them. Students without such an ancestor have other factors for
    like angles, and the mean of those means nothing.

    Args:
        adapters: Folders or hub ids of two or more students' adapters of one teacher.
        out: Adapter folder to write; new or empty.
        weights: One for each adapter, divided by their sum; all equal if not given.
        dtype: Of the written adapter.
        overwrite: Replace the folder if wadi average wrote it and nothing else is in it.
    """
    import torch

    from wadi.onestep.average import average_students

    average_students(adapters, out, weights, getattr(torch, dtype), overwrite)
    print(f"{out}: wadi generate --adapter {out}")
