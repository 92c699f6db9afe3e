"""Arguments of a call that makes images; what is not possible is told before anything is made."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from wadi.errors import WadiError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LARGEST = 16
"""Times the model's own side: images with a larger side are refused before they fill the memory."""
STOCK_STEP = 8
"""Pixels that diffusers' pipelines ask the sides to be multiples of, whatever their VAE."""
USUAL_SIDE = 1024
"""Pixels a side of the images of pipelines that have this number in their call alone."""
SEEDS = 2**63
"""Seeds are below this, as `torch.Generator` takes them."""
_ANY_SIZE = {"UpBlock2D", "CrossAttnUpBlock2D"}
"""Blocks of a U-Net that are told the size to grow to. The others double it, whatever was rounded."""


def image_size(
    pipeline: DiffusionPipeline, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Height and width of a pipeline's images in pixels; the model's own where ``None``.

    Args:
        pipeline: one with a `unet` or a `transformer`, and a VAE.
        height: pixels, or ``None``.
        width: pixels, or ``None``.

    Raises:
        WadiError: a side is not a whole number, is less than 1 or more than `LARGEST` times the model's own,
            or is not a multiple of what the model takes (`size_step`).
    """
    own, step = own_size(pipeline), size_step(pipeline)
    asked = {"--height": height, "--width": width}
    sides = zip(asked.items(), own, strict=True)
    return tuple(usual if side is None else _side(name, side, usual, step) for (name, side), usual in sides)


def own_size(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels that a pipeline's network was trained on.

    Where the network's configuration has no `sample_size`, the stock pipeline's own default.
    """
    size = _network(pipeline).config.get("sample_size") or getattr(pipeline, "default_sample_size", None)
    if size is None:
        return USUAL_SIDE, USUAL_SIDE
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows * pipeline.vae_scale_factor, columns * pipeline.vae_scale_factor


def size_step(pipeline: DiffusionPipeline) -> int:
    """Pixels that both sides of an image must be multiples of.

    That is `STOCK_STEP`, what the pipeline's image processor rounds to, and the VAE's pixels a latent times
    the latents of a transformer's patch, or those that a U-Net shrinks to one where it cannot grow to any
    size again.
    """
    network, latents = _network(pipeline), 1
    if not isinstance(network, UNet2DConditionModel):
        latents = network.config.get("patch_size") or 1
    elif not {type(block).__name__ for block in network.up_blocks} <= _ANY_SIZE:
        latents = 2**network.num_upsamplers
    processor = getattr(pipeline, "image_processor", None)
    rounded = 1 if processor is None else processor.config.vae_scale_factor
    return math.lcm(STOCK_STEP, rounded, pipeline.vae_scale_factor * latents)


def whole_number(name: str, value: Any, low: int, below: int | None = None) -> int:
    """A whole number of Python, numpy or torch as an ``int``.

    Raises:
        WadiError: it is of another type, less than `low`, or not less than `below`.
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
    """A finite number as a ``float``.

    Raises:
        WadiError: it is no number, not finite, or less than `low`.
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
    """The seed of the first of several images, of which each next one has the next seed.

    Raises:
        WadiError: it is not one whole number, is negative, or the last image's is not less than `SEEDS`.
    """
    if isinstance(seed, (list, tuple)):
        raise WadiError(
            f"{name} {seed!r}: must be one whole number, image i starts from {name} + i; for seeds of your "
            "own give `generator`, one torch.Generator for each image"
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
    """One prompt or several as a list.

    Raises:
        WadiError: there is none, or one is not text.
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
    """What a call returns.

    Raises:
        WadiError: it is none of `OUTPUT_TYPES`.
    """
    if output_type not in OUTPUT_TYPES:
        raise WadiError(f"output_type: {output_type!r} is unknown; use one of {', '.join(OUTPUT_TYPES)}")
    return output_type


def generators_of(
    seed: int | None, generator: torch.Generator | Sequence[torch.Generator] | None, images: int
) -> torch.Generator | list[torch.Generator] | None:
    """What a call's `seed` and `generator` mean: for a seed, a generator on the CPU for each image.

    Raises:
        WadiError: both are given, the seed is not possible, or the number of generators is not `images`.
    """
    if seed is not None:
        if generator is not None:
            raise WadiError("seed, generator: give one of the two")
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
    pipeline: DiffusionPipeline, height: int | None, width: int | None, from_image: bool
) -> dict[str, int]:
    """The arguments of a stock pipeline's call that give its images this size, both sides.

    Args:
        pipeline: which is called.
        height: pixels, or ``None``.
        width: pixels, or ``None``.
        from_image: whether the call has an `image`, whose size is then the usual one.

    Raises:
        WadiError: as `image_size`, or the pipeline's images always have the size of the one it is given.
    """
    if from_image and height is None and width is None:
        return {}
    if "height" not in inspect.signature(pipeline.__call__).parameters:
        raise WadiError(
            f"height, width: a {type(pipeline).__name__} makes images of the size of the one it is given; "
            "omit them, and resize the image"
        )
    return dict(zip(("height", "width"), image_size(pipeline, height, width), strict=True))


def _network(pipeline: DiffusionPipeline) -> torch.nn.Module:
    return pipeline.unet if getattr(pipeline, "unet", None) is not None else pipeline.transformer


def _side(name: str, side: Any, usual: int, step: int) -> int:
    side, largest = whole_number(name, side, 1), LARGEST * usual
    if side > largest:
        raise WadiError(
            f"{name} {side}: is more than {LARGEST} times the model's own {usual} pixels; use at most "
            f"{largest}"
        )
    if side % step:
        near = [nearest for nearest in (side - side % step, side - side % step + step) if nearest]
        raise WadiError(f"{name} {side}: must be a multiple of {step}; use {' or '.join(map(str, near))}")
    return side
