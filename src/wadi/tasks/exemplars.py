"""Exemplars: a folder of images to learn from, with or without a caption for each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from wadi.errors import WadiError
from wadi.images import image_files, open_image
from wadi.tables import read_rows, read_text

METADATA = ("metadata.jsonl", "metadata.csv")
"""Names of the file with captions, as for `imagefolder` of `datasets`: columns `file_name` and `text`."""


@dataclass(frozen=True)
class Exemplars:
    """Images and their captions.

    Attributes:
        paths: paths of the images, sorted by name.
        images: the images as `read_images` reads them.
        captions: one for each image, or ``None`` if there are none at all.
    """

    paths: tuple[Path, ...]
    images: tuple[Image.Image, ...]
    captions: tuple[str, ...] | None


def read_images(folder: str | os.PathLike) -> list[Image.Image]:
    """Read all images of a folder in the order of their names, as `open_image` does: upright, RGB.

    Raises:
        WadiError: no such folder, no image in it, or a file that cannot be read.
    """
    return [open_image(path) for path in image_files(folder)]


def read_exemplars(folder: str | os.PathLike) -> Exemplars:
    """Read the images of a folder and their captions.

    Captions are read from metadata.jsonl or metadata.csv (columns `file_name`, `text`). Without such a file
    they are read from a .txt file of the same name beside each image.

    Raises:
        WadiError: no such folder, no images in it, a file that cannot be read, or captions for some images
            only.
    """
    folder = Path(folder)
    paths = image_files(folder)
    images = tuple(read_images(folder))
    found = _from_metadata(folder) or _from_text_files(paths)
    if not found:
        return Exemplars(tuple(paths), images, None)
    if without := [path.name for path in paths if not found.get(path.name)]:
        raise WadiError(
            f"{folder}: {len(without)} of {len(paths)} images have no caption, such as {without[0]}; "
            "write a caption for every image, or for none"
        )
    return Exemplars(tuple(paths), images, tuple(found[path.name] for path in paths))


def cropped(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an image to height and width; what does not fit is cut off on both sides."""
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
