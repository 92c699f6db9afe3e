"""`wadi extract`: find the adapter between a teacher and a one-step student."""

from __future__ import annotations

from pathlib import Path

from wadi.commands.teacher_file import DEFAULT, TeacherFile


def extract(
    teacher: str,
    student: str,
    out: Path,
    teacher_file: TeacherFile = DEFAULT,
    rank: int | None = None,
    max_sweeps: int = 10,
    device: str | None = None,
    overwrite: bool = False,
) -> None:
    """Find the LoRaD adapter that turns a teacher into its one-step student, as nearly as the rank allows.

    Prints a table with five figures of each adapted layer: its share of the whole change ||W' - W||^2, how
    far it moved (||W' - W|| / ||W||), the share of its change that the adapter explains, the share that any
    rotation could explain (ceiling), and how far the norms of its rows moved. Below are the weights that are
    not adapted. The same figures are in extract.json and extract.png of the adapter folder.

    Args:
        teacher: Pipeline folder or hub id, or a single .safetensors file.
        student: Pipeline folder or hub id, as wadi export and wadi import write it.
        out: Adapter folder to write; it must be new or empty.
        rank: Rank of the adapter; if not given, that of a student of this kind of model: 256 for
            Stable Diffusion, 128 for PixArt, 64 for others.
        max_sweeps: Most sweeps of the fit; with 0 the singular value decomposition of the angles is not
            improved.
        device: Device to compute on, such as cpu or cuda:1; if not given, a GPU if there is one.
        overwrite: Replace the folder if wadi extract wrote it and nothing else is in it.
    """
    from wadi.device import chosen_device
    from wadi.directions.extract import extract_adapter, table
    from wadi.outputs import Output

    device = chosen_device(device)
    Output(out, "extract", (teacher, student, *teacher_file.inputs), overwrite).check()
    folder = teacher_file.folder(teacher)
    print(table(extract_adapter(folder, student, out, rank, max_sweeps, device, overwrite)))
    print(f"{out}: wadi generate --model {teacher} --adapter {out}")
