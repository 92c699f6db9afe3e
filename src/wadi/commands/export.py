"""`wadi export`: merge a student into a folder that plain diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from wadi.commands.teacher_file import DEFAULT, TeacherFile


def export(
    adapter: tyro.conf.Positional[str],
    out: Path,
    model: str | None = None,
    teacher_file: TeacherFile = DEFAULT,
    subject_adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Merge a student's adapter into its teacher. Plain diffusers loads the folder, without wadi.

    Args:
        adapter: Folder or hub id of the student's adapter.
        out: Folder to write. It must be new or empty.
        model: Folder or hub id of the teacher, or its single file. If omitted, the built-in teacher.
        subject_adapter: Adapter of wadi dreambooth, merged too; may be given several times.
        dtype: Precision of the written weights. If omitted, that of the teacher's files.
        overwrite: Replace the folder if wadi export wrote it and nothing else is in it.
    """
    import torch

    from wadi import emoji
    from wadi.onestep import Student, export_pipeline
    from wadi.outputs import Output

    adapters = [adapter, *subject_adapter]
    Output(out, "export", (model, *teacher_file.inputs), overwrite).check()
    teacher = teacher_file.folder(model or emoji.teacher_folder())
    export_pipeline(teacher, adapters, out, getattr(torch, dtype or "", "auto"), overwrite)
    student = Student.read(out)
    most = 1 if student is None else len(student.steps)
    steps = "1" if most == 1 else f"1 to {most}"
    print(
        f"{out}: load it with diffusers and a torch_dtype, such as torch.float32; call it with "
        f"num_inference_steps={steps}, guidance_scale=1.0"
    )
