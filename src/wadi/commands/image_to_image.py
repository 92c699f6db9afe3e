"""`wadi image-to-image`: make images in one step that keep the background and the places of another image."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from wadi.commands.images import ImageOptions
from wadi.images import open_image
from wadi.tasks import editing


@dataclass(kw_only=True)
class ImageToImageConfig(ImageOptions):
    """Options of `image_to_image`."""

    command = "image-to-image"

    image: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGE")]
    """The image. What does not fit into the size of the result is cut off."""
    strength: float = 0.6
    """How much changes, more than 0 and at most 1: with 1 little is kept of the image, with 0.3 its objects
    stay too."""
    out: Path = Path("image-to-image.png")
    """A .png or .jpg file, which shows image and results side by side; or a folder, with a file for each
    result."""


def image_to_image(config: ImageToImageConfig) -> None:
    """Make images in one step that show the prompt, with the background and the places of an image.

    The image gets as much noise as --strength says, and the student removes it in one step. Without --model
    and --adapter, the student that comes with wadi is used.
    """
    config.check()
    image = open_image(config.image)
    pipeline = config.load()
    image = editing.fitted(pipeline, image, config.height, config.width)
    sampling = config.sampling(config.strength)
    start = time.perf_counter()
    images = editing.variations(
        pipeline, config.prompt, image, sampling, config.seed, config.num_images, config.batch_size
    )
    config.finish(images, time.perf_counter() - start, editing.sheet([("image", image)], images))
