"""`wadi export`: merge a student into its teacher, in the format of the program that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from wadi.commands.teacher_file import DEFAULT, TeacherFile


def export(
    adapter: tyro.conf.Positional[str],
    out: Path,
    model: str | None = None,
    format: Literal["diffusers", "single-file", "unet", "transformer", "lycoris-diff", "lora"] = "diffusers",
    teacher_file: TeacherFile = DEFAULT,
    subject_adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    rank: int | None = None,
    max_loss: float = 0.1,
    by_layer: bool = False,
    max_shard_size: str | None = None,
    overwrite: bool = False,
) -> None:
    """Merge a student's adapter into its teacher, and write it for diffusers, ComfyUI, A1111 and others.

    docs/uses/formats.md says which program reads which format.

    Args:
        adapter: Folder or hub id of the student's adapter.
        out: Folder to write, which must be new or empty; a .safetensors file for single-file, lycoris-diff
            and lora.
        model: Folder or hub id of the teacher, or its single file. If omitted, the built-in teacher.
        format: diffusers is a folder that plain diffusers loads, without wadi. single-file is one file in the
            original layout. unet or transformer is a folder of this part alone. lycoris-diff is the exact
            difference to the teacher, lora an approximation of it, both loaded on top of the teacher.
        subject_adapter: Adapter of wadi dreambooth, merged too; may be given several times.
        dtype: Precision of the written weights. If omitted, that of the teacher's files.
        rank: Rank of a LoRA. An adapter that is a LoRA needs none and then keeps its factors exactly.
        max_loss: Share of the squared change of the weights that a LoRA may lose, from 0 to 1.
        by_layer: Print what a LoRA loses of each layer.
        max_shard_size: Largest weight file of a folder, such as 5GB. If omitted, that of diffusers.
        overwrite: Replace the file, or the folder if wadi export wrote it and nothing else is in it.
    """
    import torch

    from wadi import emoji
    from wadi.onestep import Student, export_output, export_pipeline
    from wadi.onestep.adapters import adapter_folder
    from wadi.onestep.loading import stored_dtype

    adapters = [adapter, *subject_adapter]
    export_output(out, format, (model, *teacher_file.inputs), overwrite).check()
    teacher = teacher_file.folder(model or emoji.teacher_folder())
    precision = getattr(torch, dtype or "", "auto")
    loss = export_pipeline(
        teacher, adapters, out, precision, overwrite, format, rank, max_loss, max_shard_size
    )
    if loss is not None:
        if by_layer:
            print("\n".join(f"{share:8.3%}  {layer}" for layer, share in loss.by_layer().items()))
        print(f"rank {loss.rank} loses {loss.total:.3%} of the squared change of {len(loss.layers)} weights")
    student = Student.read(adapter_folder(adapter))
    most = 1 if student is None else len(student.steps)
    steps = "1" if most == 1 else f"1 to {most}"
    print(f"{out}: {_USES[format].format(steps=steps, dtype=stored_dtype(out))}")


_USES = {
    "diffusers": "load it with diffusers, torch_dtype={dtype}, and call it with num_inference_steps={steps}, "
    "guidance_scale=1.0",
    "single-file": "load it as a checkpoint; sampler lcm, steps {steps}, cfg 1",
    "unet": "load the weights in it instead of the teacher's U-Net; sampler lcm, steps {steps}, cfg 1",
    "transformer": "load the weights in it instead of the teacher's transformer; steps {steps}, cfg 1",
    "lycoris-diff": "load it as a LoRA on the teacher, strength 1; sampler lcm, steps {steps}, cfg 1",
    "lora": "load it as a LoRA on the teacher, strength 1; sampler lcm, steps {steps}, cfg 1",
}
"""What to do with a format, in the words of the programs."""
