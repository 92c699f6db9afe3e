"""`wadi extract`: find the adapter between a teacher and a one-step student."""

from __future__ import annotations

from pathlib import Path


def extract(
    teacher: str,
    student: str,
    out: Path,
    rank: int | None = None,
    max_sweeps: int = 10,
    device: str | None = None,
    overwrite: bool = False,
) -> None:
    """Find the LoRaD adapter that turns a teacher into its one-step student, as nearly as the rank allows.

    Prints a table: of each adapted layer its share of the whole change ||W' - W||^2, how far it moved
    (||W' - W|| / ||W||), the shares of its change that the adapter explains and that any rotation could
    (ceiling), and how far the norms of its rows moved; then what is in weights that are not adapted. The same
    is in extract.json and extract.png of the adapter folder.

    Args:
        teacher: Pipeline folder or hub id.
        student: Pipeline folder or hub id, as wadi export and wadi import write it.
        out: Adapter folder to write; new or empty.
        rank: Of the adapter; 256 for a U-Net and 128 for PixArt if not given.
        max_sweeps: Of the fit; 0 takes the singular value decomposition of the angles as it is.
        device: Such as cpu or cuda:1; a GPU if there is one.
        overwrite: Replace the folder if wadi extract wrote it and nothing else is in it.
    """
    from wadi.device import chosen_device
    from wadi.directions.extract import extract_adapter, table

    device = chosen_device(device)
    print(table(extract_adapter(teacher, student, out, rank, max_sweeps, device, overwrite)))
    print(f"{out}: wadi generate --model {teacher} --adapter {out}")
