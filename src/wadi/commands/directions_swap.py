"""`wadi directions swap`: a student with the row norms, or the row directions, of its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from wadi.commands.teacher_file import DEFAULT, TeacherFile


def directions_swap(
    teacher: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEACHER")],
    student: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDENT")],
    take: Literal["norms", "directions"],
    out: Path,
    base: str | None = None,
    teacher_file: TeacherFile = DEFAULT,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Write a pipeline folder: the student with the norms, or the directions, of its teacher's rows.

    Tensors without rows, such as biases, stay the student's. Evaluate teacher, student and both swaps to see
    whether the student's images need its norms or its directions.

    Args:
        teacher: Pipeline folder or hub id, or a single .safetensors file.
        student: Pipeline folder or hub id, safetensors file, or adapter folder. With a file or an adapter,
            the rest of the pipeline is the teacher's.
        take: What is taken from the teacher.
        out: Folder to write; it must be new or empty.
        base: Base model of an adapter that names none; if not given, the teacher.
        dtype: Precision of the written weights.
        overwrite: Replace the folder if wadi directions swap wrote it and nothing else is in it.
    """
    import torch

    from wadi.directions.swap import swap_rows
    from wadi.outputs import Output

    Output(out, "directions swap", (teacher, student, base, *teacher_file.inputs), overwrite).check()
    swap_rows(teacher_file.folder(teacher), student, take, out, base, getattr(torch, dtype), overwrite)
    print(f"{out}: the student with the {take} of its teacher; load it with diffusers")
