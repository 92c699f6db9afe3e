"""`wadi inpaint`: repaint a part of an image in one step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL.Image import Resampling

from wadi.commands.images import ImageOptions
from wadi.errors import WadiError
from wadi.images import open_mask, open_picture
from wadi.tasks import editing


@dataclass(kw_only=True)
class InpaintConfig(ImageOptions):
    """Options of `inpaint`."""

    command = "inpaint"

    image: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGE")]
    """The image. What does not fit the shape of the result is cut off."""
    mask: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MASK")]
    """An image of the same size: white is repainted, black is kept. If it is partly transparent: what is
    drawn in one colour is repainted, or the hole that is cut into an image."""
    strength: float = 0.9
    """How much changes within the mask, more than 0 and at most 1. Lower, such as 0.8, keeps to the place and
    the ground of what was there; for an object where nothing was, stay at 0.9 or above."""
    candidates: int | None = None
    """How many images are repainted, of which the one whose edges show least is kept; if not given, 8 in one
    step and 1 in several. Image i is made of the noises from seed + i * candidates on."""
    out: Path = Path("inpaint.png")
    """A .png or .jpg file, which shows image, mask and results side by side; or a folder, for a file
    each."""


def inpaint(config: InpaintConfig) -> None:
    """Repaint the white part of a mask in one step; the rest of the image stays as it is, to the bit.

    Without --model and --adapter, with the student that comes with wadi.
    """
    config.check()
    candidates = config.candidates
    if candidates is None:
        candidates = editing.CANDIDATES if config.num_inference_steps == 1 else 1
    if candidates < 1:
        raise WadiError("--candidates: must be at least 1")
    config.check_seeds(config.num_images * candidates)
    picture = open_picture(config.image)
    shape = editing.binary_mask(open_mask(config.mask), picture)
    pipeline = config.load()
    picture = editing.fitted(pipeline, picture, config.height, config.width)
    shape = editing.fitted(pipeline, shape, config.height, config.width, Resampling.NEAREST)
    sampling = config.sampling(config.strength)
    start = time.perf_counter()
    images = editing.repaintings(
        pipeline,
        config.prompt,
        picture,
        shape,
        sampling,
        config.seed,
        config.num_images,
        candidates,
        config.batch_size,
    )
    seconds = time.perf_counter() - start
    config.finish(images, seconds, editing.sheet({"picture": picture, "mask": shape}, images))
