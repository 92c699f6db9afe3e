"""`wadi directions swap`: the student with the row norms, or row directions, of its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def directions_swap(
    teacher: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEACHER")],
    student: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDENT")],
    take: Literal["norms", "directions"],
    out: Path,
    base: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Write the student with the norms, or the directions, of the rows of its teacher: a pipeline folder.

    What has no rows, such as biases, stays the student's. Evaluate teacher, student and both swaps, and see
    which of the two the student's images need.

    Args:
        teacher: Pipeline folder or hub id.
        student: Pipeline folder or hub id, safetensors file, or adapter folder. Of the last two the rest of
            the pipeline is the teacher's.
        take: What of the teacher's.
        out: Folder to write; new or empty.
        base: What an adapter was made for, if it names nothing; the teacher if not given.
        dtype: Of the written weights.
        overwrite: Replace the folder if wadi directions swap wrote it and nothing else is in it.
    """
    import torch

    from wadi.directions.swap import swap_rows

    swap_rows(teacher, student, take, out, base, getattr(torch, dtype), overwrite)
    print(f"{out}: the student with the {take} of its teacher; load it with diffusers")
