"""`wadi inpaint`: repaint a part of an image in one step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL.Image import Resampling

from wadi.commands.images import ImageOptions
from wadi.images import open_image, open_mask
from wadi.onestep.arguments import check_seed, whole_number
from wadi.tasks import editing


@dataclass(kw_only=True)
class InpaintConfig(ImageOptions):
    """Options of `inpaint`."""

    command = "inpaint"

    image: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGE")]
    """The image. What does not fit into the size of the result is cut off."""
    mask: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MASK")]
    """The mask, an image of the same size: white is repainted, and black is kept. If it is partly
    transparent, the part that is drawn in one colour is repainted, or the hole that is cut into an image."""
    strength: float = 0.9
    """How much changes within the mask, more than 0 and at most 1. A lower value, such as 0.8, keeps the
    place and the background of what was there. For an object where nothing was, use at least 0.9."""
    candidates: int | None = None
    """Number of candidates for each result, of which the one with the least visible edges is kept; if not
    given, 8 in one step and 1 in several steps. Result i is made from the seeds from seed + i * candidates
    on."""
    out: Path = Path("inpaint.png")
    """A .png or .jpg file, which shows image, mask and results side by side; or a folder, with a file for
    each result."""


def inpaint(config: InpaintConfig) -> None:
    """Repaint the white part of a mask in one step; the other pixels of the image stay exactly as they are.

    Without --model and --adapter, the student that comes with wadi is used.
    """
    config.check()
    candidates = config.candidates
    if candidates is None:
        candidates = editing.CANDIDATES if config.num_inference_steps == 1 else 1
    whole_number("--candidates", candidates, 1)
    check_seed(config.seed, config.num_images * candidates, "--seed")
    image = open_image(config.image)
    mask = editing.binary_mask(open_mask(config.mask), image)
    pipeline = config.load()
    image = editing.fitted(pipeline, image, config.height, config.width)
    mask = editing.fitted(pipeline, mask, config.height, config.width, Resampling.NEAREST)
    start = time.perf_counter()
    images = editing.repaintings(
        pipeline,
        config.prompt,
        image,
        mask,
        config.sampling(config.strength),
        config.seed,
        config.num_images,
        candidates,
        config.batch_size,
    )
    seconds = time.perf_counter() - start
    config.finish(images, seconds, editing.sheet([("image", image), ("mask", mask)], images))
