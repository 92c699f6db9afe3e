"""`wadi directions`: how far the lengths and directions of weights moved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def directions(
    teacher: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEACHER")],
    student: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDENT")],
    base: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Compare the weights of a student with its teacher's: how far rows moved in length and in direction.

    Prints the means for each block and type of layer, every figure beside its null. The null is the same
    figure for a random change of the same size, which in rows of hundreds of numbers is nearly all direction
    too. With --out, the figures of each layer are written too (directions.json, directions.csv), and two
    plots (scatter.png, spectrum.png). Weights are read a layer at a time. See also wadi directions swap.

    Args:
        teacher: Pipeline folder or hub id, folder of a U-Net or transformer, or safetensors file.
        student: The same, or the folder of a PEFT adapter.
        base: Base model of an adapter that names none; if not given, the teacher.
        out: Folder to write; it must be new or empty.
        overwrite: Replace the folder if wadi directions wrote it and nothing else is in it.
    """
    from wadi.directions.compare import compare_models, output_of, table, write_comparison

    if out is not None:
        output_of(out, teacher, student, base, overwrite).check()
    comparison = compare_models(teacher, student, base)
    print(table(comparison))
    if out is not None:
        write_comparison(comparison, out, overwrite, base)
        print(f"{out}: directions.json, directions.csv, scatter.png, spectrum.png")
