"""`wadi average`: write the mean of several students."""

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

    All students must have been trained further from the same student (wadi distill --student-adapter), with
    different seeds or options. Their mean is then often better than each of them. Students that were trained
    separately may have the same angles with different factors, and then the mean of the factors is useless.

    Args:
        adapters: Folders or hub ids of the adapters of two or more students of the same teacher.
        out: Adapter folder to write. It must be new or empty.
        weights: One number for each adapter; they are divided by their sum. If omitted, all are equal.
        dtype: Precision of the written adapter.
        overwrite: Replace the folder if wadi average wrote it and nothing else is in it.
    """
    import torch

    from wadi.onestep.average import average_students

    average_students(adapters, out, weights, getattr(torch, dtype), overwrite)
    print(f"{out}: use it with wadi generate --adapter {out}")
