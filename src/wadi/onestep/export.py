"""From teacher and adapter to a folder that stock diffusers loads."""

from __future__ import annotations

import os

import torch

from wadi.onestep.pipeline import OneStepPipeline, adapter_folder, load_to_write, merge_adapter


def export_pipeline(
    teacher: str | os.PathLike,
    adapter: str | os.PathLike,
    out_folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
) -> None:
    """Merge a student into its teacher and write a diffusers folder of stock classes, whole or not at all.

    The folder needs neither wadi nor peft:

        pipeline = StableDiffusionPipeline.from_pretrained(out_folder, torch_dtype=torch.float32)
        pipeline("a red apple", num_inference_steps=1, guidance_scale=1.0).images[0]

    In float32 its pictures are `OneStepPipeline`'s bit for bit. Where anything is of half precision, also of
    the teacher's, `torch_dtype` must be given: without it diffusers mixes the files' dtypes and fails. With a
    half precision the stock scheduler forms x0 in it too.

    Args:
        teacher: folder or hub id of the teacher's pipeline; its other components are written unchanged.
        adapter: folder or hub id of the student's adapter.
        out_folder: where to write; replaced if it exists.
        dtype: dtype of the written weights. When ``None`` the merged network is float32, and the other
            components keep what the teacher's files hold.

    Raises:
        WadiError: teacher or adapter cannot be loaded, or the folder cannot be written.
    """
    folder = adapter_folder(adapter)
    pipeline = load_to_write(teacher, dtype)
    OneStepPipeline(pipeline, merge_adapter(pipeline, folder)).save_pretrained(out_folder)
