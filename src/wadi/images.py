"""Image files of a user, read alike by every command."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from wadi.errors import WadiError, tell
from wadi.files import explain_os_errors

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files of a folder that are read as images, in lower or upper case."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that are read, whatever a file's suffix; Pillow would run Ghostscript for some of the others."""
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".psd", ".svg", ".exr")
"""Files of a folder that are images and are not read, which is told."""
NEAR = 32
"""Colours that differ by no more than this, out of 255, are alike where a mask's alpha is interpreted."""


def open_picture(path: str | os.PathLike) -> Image.Image:
    """Read an image file: upright, RGB, 8 bits a channel, transparent parts on white.

    Grey values of 16 bits, of 32 bits and floating-point ones are scaled to 8 bits, not clipped: from 0 to
    65535, floating-point ones from 0 to 1, and values beyond these from the least to the greatest, which is
    told. Of several images in one file (an animation, pages) the first is read, which is told.

    Raises:
        WadiError: there is no such file, it is damaged, of another format, or too large.
    """
    image = _open(path)
    if not _has_alpha(image):
        return image.convert("RGB")
    upright = image.convert("RGBA")
    paper = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(paper, upright).convert("RGB")


def open_mask(path: str | os.PathLike) -> Image.Image:
    """Read a mask: upright, 8-bit grey, where white is repainted and black is kept.

    An opaque image gives its luminance. Transparency means one of three things; which one is told:

    - what is drawn has one colour: it is drawn on an empty layer, and what is opaque is repainted;
    - what is drawn is black and white: the luminance counts, and what is transparent is kept;
    - what is drawn is an image: a hole is cut into it, and what is transparent is repainted.

    Raises:
        WadiError: as `open_picture`, or nothing is drawn at all.
    """
    image = _open(path)
    if not _has_alpha(image):
        return image.convert("L")
    pixels = np.asarray(image.convert("RGBA"))
    alpha, visible = pixels[..., 3], pixels[pixels[..., 3] >= 128]
    if (alpha == 255).all():
        return image.convert("RGB").convert("L")
    if not len(visible):
        raise WadiError(f"{path}: is transparent all over; draw on it what shall be repainted")
    colours = visible[:, :3].astype(int)
    extreme = (colours <= NEAR).all(1) | (colours >= 255 - NEAR).all(1)
    if (colours.max(0) - colours.min(0)).max() <= NEAR:
        tell(f"{path}: a mask of one colour on a transparent ground; the colour is repainted")
        return Image.fromarray(alpha)
    if extreme.mean() > 0.95:
        tell(f"{path}: a black and white mask with transparent parts; these are kept, as black is")
        luminance = np.asarray(image.convert("RGB").convert("L")).astype(float)
        return Image.fromarray((luminance * alpha / 255).round().astype(np.uint8))
    tell(f"{path}: the mask is an image with transparent parts; these are repainted")
    return Image.fromarray(255 - alpha)


def image_files(folder: str | os.PathLike, below: bool = False) -> list[Path]:
    """The image files of a folder, by name; hidden files, such as those that a Mac writes, are skipped.

    Args:
        folder: to look in.
        below: whether its sub-folders are searched too; hidden ones are not.

    Raises:
        WadiError: no such folder, or it has no images; the message says what it has instead.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WadiError(f"{folder}: no such folder; name one with images ({', '.join(SUFFIXES)})")
    with explain_os_errors(folder, "read the folder"):
        everything = sorted(
            path
            for path in folder.rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        files = [path for path in everything if path.suffix.lower() in SUFFIXES and path.is_file()]
    found = [path for path in files if below or path.parent == folder]
    others = [path for path in everything if path.suffix.lower() in OTHER_SUFFIXES]
    left = [path for path in (files, others)[below or len(files) == len(found)] if path not in set(found)]
    kind = "images in sub-folders" if left and left[0] in files else "images of a format that is not read"
    if not found:
        instead = f"; it has {len(left)} {kind}, as {left[0].relative_to(folder)}" if left else ""
        raise WadiError(f"{folder}: has no images ({', '.join(SUFFIXES)}){instead}; put some there")
    if left:
        tell(f"{folder}: {len(left)} {kind} are skipped, as {left[0].relative_to(folder)}")
    return found


def _open(path: str | os.PathLike) -> Image.Image:
    """An upright image of a mode with 8 bits a channel."""
    try:
        if not Path(path).stat().st_size:
            raise WadiError(f"{path}: is empty, not an image; save it again")
        with Image.open(path, formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
            if image.width * image.height > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):
                raise Image.DecompressionBombError
            image.load()
            upright = _upright(image)
    except FileNotFoundError as error:
        raise WadiError(f"{path}: there is no such image; name one that exists") from error
    except Image.DecompressionBombError as error:
        raise WadiError(
            f"{path}: has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; make it smaller"
        ) from error
    except WadiError:
        raise
    except UnidentifiedImageError as error:
        raise WadiError(
            f"{path}: could not read the image: it is none of {', '.join(FORMATS)}; save it as PNG or JPEG"
        ) from error
    except Exception as error:  # Pillow's readers fail in every way on files that are damaged
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WadiError(f"{path}: could not read the image: {reason}; save it as PNG or JPEG") from error
    if frames > 1:
        tell(f"{path}: holds {frames} images, of which the first is read")
    return _eight_bits(path, upright)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data say nothing about how the image stands
        return image.copy()


def _eight_bits(path: str | os.PathLike, image: Image.Image) -> Image.Image:
    """Grey values of more bits scaled to 8; other modes as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise WadiError(f"{path}: has values that are not finite numbers; save it without them")
    low, high = values.min(), values.max()
    top = 1.0 if image.mode == "F" else 65535.0
    if low < 0 or high > top:
        tell(f"{path}: its values from {low:g} to {high:g} are scaled to black and white")
        values = (values - low) / (high - low or 1)
    else:
        if 0 < high / top < 1 / 255:
            tell(f"{path}: its values are at most {high:g} of {top:g}, so it is nearly black")
        values = values / top
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
