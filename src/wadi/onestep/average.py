"""One student of several."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from wadi.errors import WadiError
from wadi.lorad.io import average_adapters
from wadi.onestep.adapters import (
    TEXT_ENCODER_FOLDER,
    adapter_folder,
)
from wadi.onestep.student import STUDENT_FILE, Student
from wadi.outputs import Output


def average_students(
    adapters: Sequence[str | os.PathLike],
    out_folder: str | os.PathLike,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write the mean of several students' adapters, as `wadi.lorad.average_adapters` forms it.

    Args:
        adapters: folders or hub ids of the students' LoRaD adapters, with the same layers and ranks.
        out_folder: adapter folder to write; new or empty.
        weights: of each, divided by their sum; equal ones when ``None``.
        dtype: of the written factors; those of the first when ``None``.
        overwrite: replace the folder if the same function wrote it and nothing else is in it.

    Raises:
        WadiError: an adapter cannot be read, is a subject's, or is of another base than the first or has
            other layers, ranks or another alpha_T^2; the weights do not fit; or the folder may not or cannot
            be written.
    """
    output = Output(out_folder, "average", inputs=adapters, overwrite=overwrite)
    output.check()
    folders = [adapter_folder(adapter) for adapter in adapters]
    for folder in folders:
        if (folder / TEXT_ENCODER_FOLDER).is_dir():
            raise WadiError(f"{folder}: a subject's adapter, with a text encoder; name students' adapters")
    students = [Student.read(folder) for folder in folders]
    for folder, student in zip(folders, students, strict=True):
        if student != students[0]:
            raise WadiError(
                f"{folder}: not a student like {folders[0]} (another base, prediction or alpha_T^2, or no "
                f"{STUDENT_FILE}); average students of one teacher"
            )
    with output.writing() as folder:
        try:
            average_adapters(folders, folder, weights, dtype)
        except ValueError as error:
            raise WadiError(str(error)) from error
        if students[0] is not None:
            students[0].write(folder)
