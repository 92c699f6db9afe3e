"""The mean of several students."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from wadi.errors import WadiError
from wadi.lorad.io import average_adapters
from wadi.onestep.adapters import TEXT_ENCODER_FOLDER, adapter_folder
from wadi.onestep.student import STUDENT_FILE, Student
from wadi.outputs import Output


def average_students(
    adapters: Sequence[str | os.PathLike],
    out_folder: str | os.PathLike,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write the mean of several students' adapters; see `wadi.lorad.average_adapters`.

    Args:
        adapters: folders or hub ids of the students' LoRaD adapters, with the same layers and ranks.
        out_folder: adapter folder to write; new or empty.
        weights: one for each adapter, divided by their sum; equal weights when ``None``.
        dtype: dtype of the written factors; that of the first adapter when ``None``.
        overwrite: replace the folder if the same function wrote it and nothing else is in it.

    Raises:
        WadiError: an adapter cannot be read, is a subject's, or differs from the first in base model, layers,
            ranks, alpha_T^2 or steps; the weights do not fit; or the folder may not or cannot be written.
    """
    output = Output(out_folder, "average", inputs=adapters, overwrite=overwrite)
    output.check()
    folders = [adapter_folder(adapter) for adapter in adapters]
    for folder in folders:
        if (folder / TEXT_ENCODER_FOLDER).is_dir():
            raise WadiError(
                f"{folder}: is a subject's adapter with a text encoder; name only students' adapters"
            )
    students = [Student.read(folder) for folder in folders]
    for folder, student in zip(folders, students, strict=True):
        if student != students[0]:
            raise WadiError(
                f"{folder}: is not a student like {folders[0]} (it has another base model, prediction, "
                f"alpha_T^2, steps, resolution or fused LoRA, or no {STUDENT_FILE}); name students of one "
                "teacher"
            )
    with output.writing() as folder:
        try:
            average_adapters(folders, folder, weights, dtype)
        except ValueError as error:
            raise WadiError(str(error)) from error
        if students[0] is not None:
            students[0].write(folder)
