"""Pictures to learn from: a folder, with or without a caption for each."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from wadi.errors import WadiError
from wadi.files import explain_os_errors

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = ("metadata.jsonl", "metadata.csv")
"""Names of the file with the captions, as the `imagefolder` of `datasets` has them: columns `file_name` and
`text`."""


@dataclass(frozen=True)
class Exemplars:
    """Pictures and what they are said to show.

    Attributes:
        paths: of the pictures, in the order of their names.
        images: RGB, upright.
        captions: one for each picture, or ``None`` where there are none at all.
    """

    paths: tuple[Path, ...]
    images: tuple[Image.Image, ...]
    captions: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.images)


def read_exemplars(folder: str | os.PathLike) -> Exemplars:
    """Read the pictures of a folder and their captions.

    Captions come from metadata.jsonl or metadata.csv (columns `file_name`, `text`), or else from a .txt file
    beside each picture, of the same name.

    Raises:
        WadiError: no such folder, no pictures in it, a file that cannot be read, or captions for some
            pictures only.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WadiError(f"{folder}: no such folder; name one with pictures ({', '.join(SUFFIXES)})")
    with explain_os_errors(folder, "read the folder"):
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise WadiError(f"{folder}: has no pictures; put some there ({', '.join(SUFFIXES)})")
    images = tuple(_read_image(path) for path in paths)
    found = _from_metadata(folder) or _from_text_files(paths)
    if not found:
        return Exemplars(tuple(paths), images, None)
    if without := [path.name for path in paths if not found.get(path.name)]:
        raise WadiError(
            f"{folder}: {len(without)} of {len(paths)} pictures have no caption, as {without[0]}; "
            "give each one, or none"
        )
    return Exemplars(tuple(paths), images, tuple(found[path.name] for path in paths))


def square(image: Image.Image, side: int) -> Image.Image:
    """The middle of a picture as a square of so many pixels."""
    return ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise WadiError(f"{path}: could not read the picture: {error}") from error


def _from_metadata(folder: Path) -> dict[str, str]:
    for path in (folder / name for name in METADATA):
        if path.is_file():
            with explain_os_errors(path, "read the file"):
                return _rows(path)
    return {}


def _rows(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows: Iterable = (
                csv.DictReader(file)
                if path.suffix == ".csv"
                else (json.loads(line) for line in file if line.strip())
            )
            return {row["file_name"]: _one_line(row["text"]) for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise WadiError(
            f"{path}: not captions ({type(error).__name__}: {error}); every row needs file_name and text"
        ) from error


def _from_text_files(paths: list[Path]) -> dict[str, str]:
    found = {}
    for path in paths:
        text = path.with_suffix(".txt")
        if text.is_file():
            with explain_os_errors(text, "read the caption"):
                try:
                    found[path.name] = _one_line(text.read_text(encoding="utf-8"))
                except UnicodeDecodeError as error:
                    raise WadiError(f"{text}: not text in UTF-8; save it again") from error
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())
