"""Read image files of a user. Every command uses these functions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from wadi.errors import WadiError, tell
from wadi.files import explain_os_errors

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Suffixes of the files of a folder that are read as images, in lower or upper case."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that are read, whatever the suffix. For some other formats Pillow would run Ghostscript."""
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".psd", ".svg", ".exr")
"""Suffixes of images that are not read. A warning names such files."""
NEAR = 32
"""Largest difference, out of 255, of colours that count as the same in a transparent mask."""


def open_image(path: str | os.PathLike) -> Image.Image:
    """Read an image file as upright RGB with 8 bits a channel. Transparent parts become white.

    Grey values of 16 bits, 32 bits and floating point are scaled to 8 bits and not clipped: from 0 to 65535,
    and floating point from 0 to 1. If there are values beyond this range, they are scaled from the smallest
    to the largest, with a warning. If a file holds several images (an animation, pages), the first is read,
    with a warning.

    Raises:
        WadiError: there is no such file, or it is damaged, of another format, or too large.
    """
    image = _open(path)
    if not _has_alpha(image):
        return image.convert("RGB")
    upright = image.convert("RGBA")
    paper = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(paper, upright).convert("RGB")


def open_mask(path: str | os.PathLike) -> Image.Image:
    """Read a mask as upright 8-bit grey. White is repainted, black is kept.

    An opaque image gives its luminance. A transparent mask is one of three cases; a warning says which one:

    - The opaque part has one colour: it was drawn on an empty layer, and the opaque part is repainted.
    - The opaque part is black and white: the luminance counts, and the transparent part is kept.
    - The opaque part is an image: a hole was cut into it, and the transparent part is repainted.

    Raises:
        WadiError: as `open_image`, or the whole mask is transparent.
    """
    image = _open(path)
    if not _has_alpha(image):
        return image.convert("L")
    pixels = np.asarray(image.convert("RGBA"))
    alpha, visible = pixels[..., 3], pixels[pixels[..., 3] >= 128]
    if (alpha == 255).all():
        return image.convert("RGB").convert("L")
    if not len(visible):
        raise WadiError(f"{path}: is completely transparent; draw the part that shall be repainted")
    colours = visible[:, :3].astype(int)
    extreme = (colours <= NEAR).all(1) | (colours >= 255 - NEAR).all(1)
    if (colours.max(0) - colours.min(0)).max() <= NEAR:
        tell(f"{path}: the mask has one colour on a transparent background; the coloured part is repainted")
        return Image.fromarray(alpha)
    if extreme.mean() > 0.95:
        tell(f"{path}: the mask is black and white with transparent parts; these are kept, like black")
        luminance = np.asarray(image.convert("RGB").convert("L")).astype(float)
        return Image.fromarray((luminance * alpha / 255).round().astype(np.uint8))
    tell(f"{path}: the mask is an image with transparent parts; these are repainted")
    return Image.fromarray(255 - alpha)


def image_files(folder: str | os.PathLike, below: bool = False) -> list[Path]:
    """The image files of a folder, sorted by name. Hidden files, such as those of a Mac, are skipped.

    Args:
        folder: the folder.
        below: whether its sub-folders are searched too, except hidden ones.

    Raises:
        WadiError: there is no such folder, or it has no images; the message says what it has instead.
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
        instead = f"; it has {len(left)} {kind}, such as {left[0].relative_to(folder)}" if left else ""
        raise WadiError(f"{folder}: has no images ({', '.join(SUFFIXES)}){instead}; put some there")
    if left:
        tell(f"{folder}: {len(left)} {kind} are skipped, such as {left[0].relative_to(folder)}")
    return found


def _open(path: str | os.PathLike) -> Image.Image:
    """An upright image of a mode with 8 bits a channel."""
    try:
        if not Path(path).stat().st_size:
            raise WadiError(f"{path}: is an empty file and not an image; save it again")
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
        tell(f"{path}: holds {frames} images; only the first is read")
    return _eight_bits(path, upright)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data do not say which side is up
        return image.copy()


def _eight_bits(path: str | os.PathLike, image: Image.Image) -> Image.Image:
    """Scale grey values of more than 8 bits to 8. Other modes stay as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise WadiError(f"{path}: has values that are not finite numbers; save it without such values")
    low, high = values.min(), values.max()
    top = 1.0 if image.mode == "F" else 65535.0
    if low < 0 or high > top:
        tell(f"{path}: its values from {low:g} to {high:g} are scaled, from black to white")
        values = (values - low) / (high - low or 1)
    else:
        if 0 < high / top < 1 / 255:
            tell(f"{path}: its values are at most {high:g} of {top:g}, so it is nearly black")
        values = values / top
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
