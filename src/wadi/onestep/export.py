"""Merge teacher and adapter into a folder that stock diffusers loads."""

from __future__ import annotations

import os
from collections.abc import Sequence

from wadi.onestep.adapters import as_list
from wadi.onestep.components import Dtype
from wadi.onestep.pipeline import StudentPipeline
from wadi.outputs import Output


def export_pipeline(
    teacher: str | os.PathLike,
    adapter: str | os.PathLike | Sequence[str | os.PathLike],
    out_folder: str | os.PathLike,
    dtype: Dtype = "auto",
    overwrite: bool = False,
) -> None:
    """Merge a student into its teacher and write a diffusers folder of stock classes, or nothing on failure.

    The folder needs neither wadi nor peft:

        pipeline = StableDiffusionPipeline.from_pretrained(out_folder, torch_dtype=torch.float32)
        pipeline("a red apple", num_inference_steps=1, guidance_scale=1.0).images[0]

    A student of several steps takes more: ``num_inference_steps=4``. In float32 its images equal those of
    `StudentPipeline` bit for bit, except that most pipelines of flows draw the noise between two steps from
    torch's global generator. Merging computes in float32; weights that are written in half precision are
    rounded once. Give a ``torch_dtype`` for such a folder, because the libraries' defaults mix dtypes; with
    ``torch.float16`` the stock scheduler computes x0 in it too.

    Args:
        teacher: folder or hub id of the teacher's pipeline; its other components are written unchanged.
        adapter: folder or hub id of the student's adapter, or several, of which the others are stacked on it.
        out_folder: where to write; new or empty.
        dtype: dtype of the written weights; "auto" for that of the teacher's files.
        overwrite: replace the folder if the same function wrote it and nothing else is in it.

    Raises:
        WadiError: teacher or adapter cannot be loaded, or the folder may not or cannot be written.
    """
    output = Output(out_folder, "export", inputs=(teacher, *as_list(adapter)), overwrite=overwrite)
    output.check()
    StudentPipeline.from_pretrained(teacher, adapter, torch_dtype=dtype).write(output)
