"""`wadi export`: merge a student into a folder that plain diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro


def export(
    adapter: tyro.conf.Positional[str],
    out: Path,
    model: str | None = None,
    teacher_config: str | None = None,
    teacher_lora: str | None = None,
    teacher_lora_scale: float = 1.0,
    subject_adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> None:
    """Merge a student's adapter into its teacher. Plain diffusers loads the folder, without wadi.

    Args:
        adapter: Folder or hub id of the student's adapter.
        out: Folder to write. It must be new or empty.
        model: Folder or hub id of the teacher, or its single file. If omitted, the built-in teacher.
        teacher_config: For a single file: a diffusers folder or hub id of the same kind of model.
        teacher_lora: LoRA file that is fused into the teacher, as wadi distill did.
        teacher_lora_scale: Number that the change of the LoRA is multiplied by.
        subject_adapter: Adapter of wadi dreambooth, merged too; may be given several times.
        dtype: Precision of the written weights.
        overwrite: Replace the folder if wadi export wrote it and nothing else is in it.
    """
    import torch

    from wadi import emoji
    from wadi.onestep import Student, export_pipeline
    from wadi.outputs import Output
    from wadi.teachers import prepare_teacher

    adapters = [adapter, *subject_adapter]
    Output(out, "export", (model, teacher_config, teacher_lora), overwrite).check()
    named = model or emoji.teacher_folder()
    teacher = prepare_teacher(named, teacher_config, teacher_lora, teacher_lora_scale)
    export_pipeline(teacher, adapters, out, getattr(torch, dtype), overwrite)
    student = Student.read(out)
    most = 1 if student is None else len(student.steps)
    steps = "1" if most == 1 else f"1 to {most}"
    print(f"{out}: load it with diffusers, num_inference_steps={steps}, guidance_scale=1.0")
