"""Checks of the arguments of a call that makes images, before any image is made."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from wadi.errors import WadiError
from wadi.onestep.student import network_of

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LARGEST = 16
"""Largest side of an image, as a multiple of the model's own. Larger images would fill the memory."""
STOCK_STEP = 8
"""Sides in pixels must be multiples of this in diffusers' pipelines, whatever their VAE."""
USUAL_SIDE = 1024
"""Pixels a side of the images of pipelines whose call alone has this number."""
SEEDS = 2**63
"""Seeds must be below this, for `torch.Generator`."""
_ANY_SIZE = {"UpBlock2D", "CrossAttnUpBlock2D"}
"""Up blocks of a U-Net that can grow to any size. Other up blocks always double the size."""


def image_size(
    pipeline: DiffusionPipeline, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Height and width of a pipeline's images in pixels. ``None`` means the model's own.

    Args:
        pipeline: one with a `unet` or a `transformer`, and a VAE.
        height: pixels, or ``None``.
        width: pixels, or ``None``.

    Raises:
        WadiError: a side is not a whole number, is less than 1, more than `LARGEST` times the model's own or
            more than the network has places for, or is not a multiple of what the model takes (`size_step`).
    """
    own, step, places = own_size(pipeline), size_step(pipeline), _places(pipeline)
    asked = {"--height": height, "--width": width}
    sides = zip(asked.items(), own, strict=True)
    return tuple(
        usual if side is None else _side(name, side, usual, step, places) for (name, side), usual in sides
    )


def own_size(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels that a pipeline's network was trained on.

    If the network's configuration has no `sample_size`, it is the stock pipeline's own default.
    """
    size = network_of(pipeline).config.get("sample_size") or getattr(pipeline, "default_sample_size", None)
    if size is None:
        return USUAL_SIDE, USUAL_SIDE
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows * pipeline.vae_scale_factor, columns * pipeline.vae_scale_factor


def size_step(pipeline: DiffusionPipeline) -> int:
    """Pixels that both sides of an image must be multiples of.

    This is a multiple of `STOCK_STEP` (the pipeline's image processor rounds to it) and of the pixels of a
    latent. A transformer also needs whole patches. A U-Net whose up blocks always double the size also needs
    sides that its down blocks can halve exactly.
    """
    network, latents = network_of(pipeline), 1
    if not isinstance(network, UNet2DConditionModel):
        latents = network.config.get("patch_size") or 1
    elif not {type(block).__name__ for block in network.up_blocks} <= _ANY_SIZE:
        latents = 2**network.num_upsamplers
    processor = getattr(pipeline, "image_processor", None)
    rounded = 1 if processor is None else processor.config.vae_scale_factor
    return math.lcm(STOCK_STEP, rounded, pipeline.vae_scale_factor * latents)


def whole_number(name: str, value: Any, low: int, below: int | None = None) -> int:
    """Return a whole number of Python, numpy or torch as an ``int``.

    Raises:
        WadiError: the value is of another type, less than `low`, or not less than `below`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise WadiError(f"{name} {value!r}: must be one whole number") from error
    if number < low or (below is not None and number >= below):
        most = "" if below is None else f" and less than {below}"
        raise WadiError(f"{name} {number}: must be at least {low}{most}")
    return number


def finite_number(name: str, value: Any, low: float = -math.inf) -> float:
    """Return a finite number as a ``float``.

    Raises:
        WadiError: the value is not a number, not finite, or less than `low`.
    """
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError) as error:
        raise WadiError(f"{name} {value!r}: must be a number") from error
    if not math.isfinite(number) or number < low:
        least = "" if low == -math.inf else f", at least {low:g}"
        raise WadiError(f"{name} {value!r}: must be a finite number{least}")
    return number


def check_seed(seed: Any, images: int = 1, name: str = "seed") -> int:
    """Check the seed of the first of several images. Image i has this seed + i.

    Raises:
        WadiError: it is not one whole number, is negative, or the last image's is not less than `SEEDS`.
    """
    if isinstance(seed, (list, tuple)):
        raise WadiError(
            f"{name} {seed!r}: must be one whole number, because image i starts from {name} + i; for other "
            "seeds give `generator`, one torch.Generator for each image"
        )
    return whole_number(name, seed, 0, SEEDS - images + 1)


def seeded(seed: int, images: int) -> list[torch.Generator]:
    """A generator on the CPU for each image, image i from `seed` + i.

    Raises:
        WadiError: as `check_seed`.
    """
    first = check_seed(seed, images)
    return [torch.Generator().manual_seed(first + i) for i in range(images)]


def prompt_list(prompt: Any) -> list[str]:
    """Return one prompt or several as a list.

    Raises:
        WadiError: the list is empty, or one of its entries is not text.
    """
    if isinstance(prompt, str):
        return [prompt]
    try:
        prompts = list(prompt)
    except TypeError as error:
        raise WadiError(f"prompt {prompt!r}: must be text, or a list of texts") from error
    if not prompts:
        raise WadiError("prompt: the list is empty; give at least one prompt")
    for i, text in enumerate(prompts):
        if not isinstance(text, str):
            raise WadiError(f"prompt: number {i + 1} of {len(prompts)} must be text, but is {text!r}")
    return prompts


def output_kind(output_type: Any) -> str:
    """Check the output type of a call.

    Raises:
        WadiError: the type is none of `OUTPUT_TYPES`.
    """
    if output_type not in OUTPUT_TYPES:
        raise WadiError(f"output_type: {output_type!r} is unknown; use one of {', '.join(OUTPUT_TYPES)}")
    return output_type


def generators_of(
    seed: int | None, generator: torch.Generator | Sequence[torch.Generator] | None, images: int
) -> torch.Generator | list[torch.Generator] | None:
    """The generators for a call's `seed` or `generator`. A seed gives a CPU generator for each image.

    Raises:
        WadiError: both are given, the seed is not possible, or the number of generators is not `images`.
    """
    if seed is not None:
        if generator is not None:
            raise WadiError("seed, generator: give only one of the two")
        return seeded(seed, images)
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    several = list(generator) if isinstance(generator, (list, tuple)) else [None]
    if not all(isinstance(each, torch.Generator) for each in several):
        raise WadiError(f"generator {generator!r}: must be a torch.Generator, or a list of them")
    if len(several) != images:
        raise WadiError(f"generator: {len(several)} generators for {images} images; give one for each")
    return several


def size_arguments(
    pipeline: DiffusionPipeline,
    height: int | None = None,
    width: int | None = None,
    from_image: bool = False,
) -> dict[str, int]:
    """The arguments of a stock pipeline's call that set the size of its images.

    Args:
        pipeline: the pipeline that is called.
        height: pixels, or ``None``.
        width: pixels, or ``None``.
        from_image: whether the call has an `image`. The default size is then that of the image.

    Raises:
        WadiError: as `image_size`, or the pipeline's results always have the size of the given image.
    """
    if from_image and height is None and width is None:
        return {}
    if "height" not in inspect.signature(pipeline.__call__).parameters:
        raise WadiError(
            f"height, width: the result of a {type(pipeline).__name__} has the size of the image that it is "
            "given; omit them, and resize the image"
        )
    return dict(zip(("height", "width"), image_size(pipeline, height, width), strict=True))


def _places(pipeline: DiffusionPipeline) -> int | None:
    """Most pixels of a side for which the network has embeddings of places; ``None`` where it makes any."""
    config = network_of(pipeline).config
    patches = config.get("pos_embed_max_size")  # of Stable Diffusion 3
    return patches and patches * config.patch_size * pipeline.vae_scale_factor


def _side(name: str, side: Any, usual: int, step: int, places: int | None) -> int:
    side, largest = whole_number(name, side, 1), LARGEST * usual
    if places is not None and side > places:
        raise WadiError(f"{name} {side}: this model makes at most {places} pixels a side; use that or less")
    if side > largest:
        raise WadiError(
            f"{name} {side}: is more than {LARGEST} times the model's own {usual} pixels; use at most "
            f"{largest}"
        )
    if side % step:
        near = [nearest for nearest in (side - side % step, side - side % step + step) if nearest]
        raise WadiError(f"{name} {side}: must be a multiple of {step}; use {' or '.join(map(str, near))}")
    return side
