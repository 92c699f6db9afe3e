"""Images made of images in one step: image to image, and inpainting.

A student was distilled at the last timestep T alone, from pure noise. Here it is asked at an earlier t, for
x0 = (x_t - sigma_t eps(x_t, t, c)) / alpha_t of the noised image x_t = alpha_t x + sigma_t n (SDEdit,
arXiv 2108.01073, with a single step). Nothing was trained for that; what it gives is in docs/uses/editing.md.
The pipelines are diffusers' own, which take the timestep as `timesteps`: their `strength` chooses among the
steps of a schedule, and of one step nothing is left for a strength below 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image, ImageOps

from wadi.errors import WadiError
from wadi.onestep import OneStepPipeline, labelled_grid, refuse_guidance
from wadi.onestep.arguments import image_size, seeded
from wadi.onestep.output import tell_odd_output

STRENGTH = 0.7
"""Strength of image to image and inpainting, where none is given."""

CANDIDATES = 8
"""Repaintings in one step of which the best is kept."""


@dataclass(frozen=True)
class Sampling:
    """How a model is asked: a student in one step, a multi-step model in several guided ones.

    Attributes:
        strength: how much noise the image gets, in (0, 1], as a share of the training's timesteps: at 1
            almost nothing of it is left.
        num_inference_steps: 1 for a student. A multi-step model takes `strength` of them.
        guidance_scale: of a multi-step model.
        negative_prompt: of a multi-step model.
    """

    strength: float = STRENGTH
    num_inference_steps: int = 1
    guidance_scale: float = 1.0
    negative_prompt: str | None = None


def timestep_of(scheduler: SchedulerMixin, strength: float) -> int:
    """The timestep that a strength stands for: the last one for 1, the first for almost 0.

    Raises:
        WadiError: the strength is not in (0, 1], or the schedule has no noise there: that of a student with
            an alpha_T of its own has noise at T alone.
    """
    if not 0 < strength <= 1:
        raise WadiError(f"strength: must be more than 0 and at most 1, but is {strength:g}")
    timestep = max(0, round(strength * scheduler.config.num_train_timesteps) - 1)
    if scheduler.alphas_cumprod[timestep] >= 1:
        raise WadiError(
            f"strength {strength:g}: this student has an alpha_T of its own, and no noise schedule below T; "
            "use strength 1, or the multi-step teacher"
        )
    return timestep


@torch.no_grad()
def image_to_image(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    images: torch.Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Make of each image one that shows its prompt, and keeps of it what the strength leaves.

    Args:
        pipeline: a `StableDiffusionPipeline`, with the scheduler that the steps need (`load_for_steps`).
        prompts: N.
        images: (N, 3, H, W) in [0, 1], float32; sides that the autoencoder takes.
        sampling: how.
        generators: N, one for each image.

    Returns:
        (N, 3, H, W) in [0, 1], float32 on the CPU.

    Raises:
        WadiError: guidance or a negative prompt in one step, a strength that leaves no step, or another kind
            of pipeline.
    """
    stock = _stock(StableDiffusionImg2ImgPipeline, pipeline, sampling)
    return _call(stock, prompts, sampling, generators, image=images)


@torch.no_grad()
def inpaint(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    images: torch.Tensor,
    masks: torch.Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Repaint what is masked of each image; all else stays as it is, to the bit.

    The step starts from the noised image, masked part and all, so that the new object finds the ground and
    the place of what was there; afterwards the known latents are put back (as diffusers does after every
    step) and, in the decoded image, the known pixels.

    Args:
        pipeline: as in `image_to_image`; its U-Net sees latents alone, no mask.
        prompts: N.
        images: (N, 3, H, W) in [0, 1], float32.
        masks: (N, 1, H, W), 1 where an image is repainted and 0 elsewhere.
        sampling: how.
        generators: N, one for each image.

    Returns:
        (N, 3, H, W) in [0, 1], float32 on the CPU.

    Raises:
        WadiError: as `image_to_image`.
    """
    stock = _stock(StableDiffusionInpaintPipeline, pipeline, sampling)
    sides = {"height": images.shape[-2], "width": images.shape[-1]}
    options = {"image": images, "mask_image": masks, **sides}
    if sampling.num_inference_steps == 1:
        options["latents"] = _noised(stock, images, sampling.strength, generators)
    made = _call(stock, prompts, sampling, generators, **options)
    return torch.where(masks.cpu() > 0.5, made, images.cpu())


def seam(images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """How visible the edge of a mask is: mean absolute difference of neighbours on either side of it.

    Args:
        images: (N, C, H, W).
        masks: (N, 1, H, W), 0 or 1.

    Returns:
        (N,), in the unit of `images`; nan where a mask has no edge.
    """
    total, count = 0, 0
    for axis in (-1, -2):
        difference = images.diff(dim=axis).abs().mean(1, keepdim=True)
        edge = masks.diff(dim=axis) != 0
        total = total + (difference * edge).flatten(1).sum(1)
        count = count + edge.flatten(1).sum(1)
    return total / count


def variations(
    pipeline: DiffusionPipeline,
    prompt: str,
    picture: Image.Image,
    sampling: Sampling,
    seed: int = 0,
    num_images: int = 1,
    batch_size: int = 8,
) -> list[Image.Image]:
    """`image_to_image` of one image, several times; number i from the noise of `seed` + i.

    Args:
        pipeline: see `image_to_image`.
        prompt: what the results show.
        image: of a size that the model makes (`fitted`).
        sampling: how.
        seed: of the first result.
        num_images: how many.
        batch_size: how many at once.
    """
    image, made = _to_tensor(picture), []
    for first in range(0, num_images, batch_size):
        count = min(batch_size, num_images - first)
        generators = seeded(seed + first, count)
        made.append(
            image_to_image(pipeline, [prompt] * count, image.expand(count, -1, -1, -1), sampling, generators)
        )
    return _to_pictures(torch.cat(made))


def repaintings(
    pipeline: DiffusionPipeline,
    prompt: str,
    picture: Image.Image,
    mask: Image.Image,
    sampling: Sampling,
    seed: int = 0,
    num_images: int = 1,
    candidates: int = CANDIDATES,
    batch_size: int = 8,
) -> list[Image.Image]:
    """`inpaint` of one image, several times, each the best of some candidates.

    A step does not see what is around the mask when it puts its object there: now and then the object is cut
    off, or the ground has another colour. A step costs little, so several are made and the one with the least
    `seam` is kept.

    Args:
        pipeline: see `inpaint`.
        prompt: what the results show.
        image: of a size that the model makes (`fitted`).
        mask: of the same size; white is repainted (`binary_mask`).
        sampling: how.
        seed: result i is the best of the noises of seed + i * candidates and those that follow.
        num_images: how many.
        candidates: repaintings for each result.
        batch_size: how many at once.
    """
    image, masks, made = _to_tensor(picture), _to_tensor(mask)[:, :1].round(), []
    total = num_images * candidates
    for first in range(0, total, batch_size):
        count = min(batch_size, total - first)
        generators = seeded(seed + first, count)
        copies = [tensor.expand(count, -1, -1, -1) for tensor in (image, masks)]
        made.append(inpaint(pipeline, [prompt] * count, *copies, sampling, generators))
    images = torch.cat(made)
    seams = seam(images, masks.expand(total, -1, -1, -1)).view(num_images, candidates)
    return _to_pictures(images[torch.arange(num_images) * candidates + seams.argmin(1)])


def fitted(
    pipeline: DiffusionPipeline,
    picture: Image.Image,
    height: int | None = None,
    width: int | None = None,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """An image in a size that the model makes, its own if none is given; what does not fit is cut off.

    Raises:
        WadiError: not a Stable Diffusion pipeline, or a size that it cannot make.
    """
    _check_pipeline(pipeline)
    size = image_size(pipeline, height, width)[::-1]
    return picture if picture.size == size else ImageOps.fit(picture, size, resample)


def binary_mask(mask: Image.Image, picture: Image.Image) -> Image.Image:
    """A mask of black and white, made of one of greys.

    Raises:
        WadiError: another size than the image's, nothing to repaint, or nothing to keep.
    """
    if mask.size != picture.size:
        raise WadiError(
            "MASK: is {} x {} pixels and the image {} x {}; draw it on the image".format(
                *mask.size, *picture.size
            )
        )
    binary = mask.convert("L").point(lambda value: 255 if value >= 128 else 0)
    low, high = binary.getextrema()
    if high == 0:
        raise WadiError("MASK: is black all over, so nothing is repainted; paint white what shall change")
    if low == 255:
        raise WadiError("MASK: is white all over, so nothing is kept; use wadi image-to-image")
    return binary


def sheet(inputs: dict[str, Image.Image], results: Sequence[Image.Image], columns: int = 4) -> Image.Image:
    """Show what went in and what came of it, side by side: inputs by their headings, then results."""
    cells = list(inputs.values())
    rows = [("", [*cells, *results[start : start + columns]]) for start in range(0, len(results), columns)]
    return labelled_grid(rows, [*inputs, "result"])


def _stock(kind: type, pipeline: DiffusionPipeline, sampling: Sampling) -> DiffusionPipeline:
    """diffusers' pipeline of a kind on the parts of another; refuses what cannot be."""
    _check_pipeline(pipeline)
    own = pipeline.scheduler
    if isinstance(own, LCMScheduler) and own.config.original_inference_steps == 1:
        refuse_guidance(sampling.num_inference_steps)
    timestep_of(own, sampling.strength)
    steps = sampling.num_inference_steps
    if steps > 1 and int(steps * sampling.strength) < 1:
        raise WadiError(
            f"strength {sampling.strength:g}: leaves no step of {steps}; use at least {1 / steps:.3g}"
        )
    stock = kind(**pipeline.components, requires_safety_checker=False)
    stock.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return stock


def _check_pipeline(pipeline: DiffusionPipeline) -> None:
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise WadiError(
            f"--model: is a {type(pipeline).__name__}; diffusers makes images of images with a "
            "StableDiffusionPipeline; name one"
        )
    if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise WadiError(
            f"--model: its U-Net takes {pipeline.unet.config.in_channels} channels, latents have "
            f"{pipeline.vae.config.latent_channels}; name a model that was not made for inpainting alone"
        )
    if not isinstance(pipeline.unet.config.sample_size, int):
        raise WadiError(
            "--model: its own images are not square, and diffusers' pipelines for images of images take only "
            "models of square ones; name another"
        )


def _call(
    stock: DiffusionPipeline,
    prompts: Sequence[str],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    **options: Any,
) -> torch.Tensor:
    negative = sampling.negative_prompt
    options |= {
        "generator": list(generators),
        "guidance_scale": sampling.guidance_scale,
        "negative_prompt": None if negative is None else [negative] * len(prompts),
        "output_type": "pt",
    }
    if sampling.num_inference_steps == 1:
        one_step = OneStepPipeline(stock)
        timestep = timestep_of(one_step.pipeline.scheduler, sampling.strength)
        return one_step(prompts, strength=1.0, timesteps=[timestep], **options).float().cpu()
    steps = {"strength": sampling.strength, "num_inference_steps": sampling.num_inference_steps}
    output = stock(list(prompts), **steps, **options)
    tell_odd_output(output, [f"image of seed {each.initial_seed()}" for each in generators])
    return output.images.float().cpu()


def _noised(
    stock: DiffusionPipeline, images: torch.Tensor, strength: float, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """x_t of images: their latents (the mode, not a sample), with the generators' noise."""
    vae, scheduler = stock.vae, stock.scheduler
    pixels = (2 * images - 1).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    noise = torch.cat([torch.randn(1, *latents.shape[1:], generator=each) for each in generators])
    timesteps = torch.full((len(images),), timestep_of(scheduler, strength), device=latents.device)
    return scheduler.add_noise(latents, noise.to(latents), timesteps)


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _to_pictures(images: torch.Tensor) -> list[Image.Image]:
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in pixels]
