"""Images written to files, and laid out in grids with labels."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from wadi.outputs import Output

KINDS = {
    ".png": ("PNG", {"optimize": True}),
    ".jpg": ("JPEG", {"quality": 85}),
    ".jpeg": ("JPEG", {"quality": 85}),
    ".webp": ("WEBP", {"quality": 85}),
}
"""Suffix of an image file -> Pillow's name of its format, and the options to write it with."""

READABLE = 128
"""Width in pixels. Smaller images are enlarged by the smallest whole factor that reaches it."""

_GAP = 6
_PAPER = (255, 255, 255)
_INK = (40, 40, 40)
_SOFTWARE = 0x0131
"""EXIF's number of the tag that PNG calls Software."""


def image_output(
    path: str | os.PathLike,
    command: str,
    inputs: Sequence[str | os.PathLike | None] = (),
    overwrite: bool = False,
    option: str = "--out",
) -> Output:
    """The `Output` of an image file that is new, or was written by the same command, or may be overwritten.

    An image file says which command wrote it (the tag Software of PNG or EXIF), so a command may replace its
    own images.
    """
    return Output(path, command, inputs, overwrite, suffixes=tuple(KINDS), option=option, signed=_written_by)


def check_image_path(path: str | os.PathLike, option: str = "--out", overwrite: bool = False) -> None:
    """Raise unless `save_image` can write this file. Call it before long work whose result is the image.

    Args:
        path: the file.
        option: the option that named the file, for the message.
        overwrite: whether an existing file may be replaced.

    Raises:
        WadiError: the suffix is none of `KINDS`, or the file exists and `save_image` did not write it.
    """
    image_output(path, "save_image", overwrite=overwrite, option=option).check()


def save_image(image: Image.Image, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Write an image in the format that the suffix of `path` names. A failed write leaves no file.

    Args:
        image: the image, of any mode that the format can hold.
        path: the file.
        overwrite: replace an existing file. A file that this function wrote is always replaced.

    Raises:
        WadiError: as `check_image_path`, or the file could not be written.
    """
    write_image(image, image_output(path, "save_image", overwrite=overwrite, option="image file"))


def write_image(image: Image.Image, output: Output) -> None:
    """`save_image` for a command that has an `Output` of its own."""
    software = f"wadi {output.command}"
    with output.writing() as temporary:
        kind, options = KINDS[Path(output.path).suffix.lower()]
        if kind == "PNG":
            text = PngInfo()
            text.add_text("Software", software)
            image.save(temporary, kind, pnginfo=text, **options)
        else:
            exif = Image.Exif()
            exif[_SOFTWARE] = software
            image.save(temporary, kind, exif=exif, **options)


def save_images(images: Sequence[Image.Image], seed: int, output: Output) -> None:
    """Write images to one file, where several form a grid, or to a new folder as files named by their seeds.

    Args:
        images: one or more.
        seed: the seed of the first image. Image i has seed + i.
        output: one file (see `image_output`) or a folder.
    """
    if output.suffixes:
        write_image(images[0] if len(images) == 1 else image_grid(images), output)
        return
    with output.writing() as folder:
        for i, image in enumerate(images):
            write_image(image, image_output(folder / f"seed-{seed + i:06d}.png", output.command))


def _written_by(path: Path) -> str | None:
    """The wadi command that an image file names as its writer, if any."""
    try:
        with Image.open(path) as image:
            software = image.info.get("Software") or image.getexif().get(_SOFTWARE)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # not an image
        return None
    found = str(software)
    return found.removeprefix("wadi ") if found.startswith("wadi ") else None


def enlarge(image: Image.Image) -> Image.Image:
    """Enlarge a small image by a whole factor until it is `READABLE`. The result is RGB."""
    factor = max(1, math.ceil(READABLE / image.width))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Lay out images of equal size row by row, nearly as a square when `columns` is ``None``."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = [("", images[start : start + columns]) for start in range(0, len(images), columns)]
    return labelled_grid(rows)


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], headings: Sequence[str] = ()
) -> Image.Image:
    """Lay out rows of images of equal size, each row with its label (a prompt, a method) on the left.

    Args:
        rows: label and images of each row. If all labels are empty, there is no column of labels.
        headings: words above the columns, wrapped to their width. There may be fewer than columns.

    Returns:
        An RGB image on white.
    """
    rows = [(label, [enlarge(image) for image in images]) for label, images in rows]
    width, height = rows[0][1][0].size
    font = ImageFont.load_default(size=max(13, height // 10))
    left = int(1.4 * width) if any(label for label, _ in rows) else 0
    # a heading is no wider than its column; 0.55: the width of a letter
    headings = ["\n".join(wrap(heading, max(8, int(width / (0.55 * font.size))))) for heading in headings]
    lines = 1 + max((heading.count("\n") for heading in headings), default=0)
    top = int((0.6 + 1.2 * lines) * font.size) if any(headings) else 0
    columns = max(len(images) for _, images in rows)
    size = (_GAP + left + columns * (width + _GAP), _GAP + top + len(rows) * (height + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        x = _GAP + left + column * (width + _GAP) + width // 2
        draw.multiline_text((x, _GAP + top // 2), heading, _INK, font, anchor="mm", align="center")
    for row, (label, images) in enumerate(rows):
        y = _GAP + top + row * (height + _GAP)
        characters = max(8, int(left / (0.55 * font.size)))
        text = "\n".join(wrap(label, characters))
        if text:
            draw.multiline_text((left - _GAP, y + height // 2), text, _INK, font, anchor="rm", align="right")
        for column, image in enumerate(images):
            sheet.paste(image, (_GAP + left + column * (width + _GAP), y))
    return sheet
