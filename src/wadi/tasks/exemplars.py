"""Images to learn from: a folder, with or without a caption for each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from wadi.errors import WadiError
from wadi.images import image_files, open_picture
from wadi.tables import read_rows, read_text

METADATA = ("metadata.jsonl", "metadata.csv")
"""Names of the file with the captions, as the `imagefolder` of `datasets` has them: columns `file_name` and
`text`."""


@dataclass(frozen=True)
class Exemplars:
    """Images and what they are said to show.

    Attributes:
        paths: of the images, in the order of their names.
        images: RGB, upright; see `open_picture`.
        captions: one for each image, or ``None`` where there are none at all.
    """

    paths: tuple[Path, ...]
    images: tuple[Image.Image, ...]
    captions: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.images)


def read_exemplars(folder: str | os.PathLike) -> Exemplars:
    """Read the images of a folder and their captions.

    Captions come from metadata.jsonl or metadata.csv (columns `file_name`, `text`), or else from a .txt file
    beside each image, of the same name.

    Raises:
        WadiError: no such folder, no images in it, a file that cannot be read, or captions for some images
            only.
    """
    folder = Path(folder)
    paths = image_files(folder)
    images = tuple(open_picture(path) for path in paths)
    found = _from_metadata(folder) or _from_text_files(paths)
    if not found:
        return Exemplars(tuple(paths), images, None)
    if without := [path.name for path in paths if not found.get(path.name)]:
        raise WadiError(
            f"{folder}: {len(without)} of {len(paths)} images have no caption, as {without[0]}; "
            "give each one, or none"
        )
    return Exemplars(tuple(paths), images, tuple(found[path.name] for path in paths))


def cropped(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of an image, as much as fits, in so many pixels."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _from_metadata(folder: Path) -> dict[str, str]:
    path = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if path is None:
        return {}
    captions = {}
    for line, row in read_rows(path):
        name, text = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise WadiError(f"{path}: line {line}: not a caption; every row needs file_name and text")
        captions[name] = _one_line(text)
    return captions


def _from_text_files(paths: list[Path]) -> dict[str, str]:
    texts = {path.name: path.with_suffix(".txt") for path in paths}
    return {name: _one_line(read_text(text)) for name, text in texts.items() if text.is_file()}


def _one_line(text: str) -> str:
    return " ".join(text.split())
