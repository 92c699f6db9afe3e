"""Images made of images in one step, or a few: image to image, and inpainting.

A student of one step was distilled at the last timestep T alone, from pure noise. Here it is asked at an
earlier timestep t (SDEdit, arXiv 2108.01073, with a single step): the image is noised to x_t = alpha_t x +
sigma_t n, and the result is x0 = (x_t - sigma_t eps(x_t, t, c)) / alpha_t. Nothing was trained for it;
docs/uses/editing.md shows how well it works. The pipelines are diffusers' own. They are given the timestep as
`timesteps`, because their `strength` chooses among the steps of a schedule, and a schedule of one step has
none left for a strength below 1.

A student of several steps was trained at each of them. It begins at the one that is nearest to the strength,
and takes those that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from wadi.errors import WadiError
from wadi.onestep import StudentPipeline, labelled_grid
from wadi.onestep.arguments import image_size, seeded
from wadi.onestep.output import tell_odd_output
from wadi.onestep.scheduler import step_times
from wadi.onestep.student import is_student

STRENGTH = 0.7
"""Strength of image to image and inpainting if none is given."""

CANDIDATES = 8
"""Number of inpaintings in one step, of which the best is kept."""


@dataclass(frozen=True)
class Sampling:
    """How a model makes images: a student in one step, a multi-step model in several guided steps.

    Attributes:
        strength: how much noise an image gets, in (0, 1], as a share of the training's timesteps; with 1
            almost nothing is left of the image. It is not used for images made of a prompt alone.
        num_inference_steps: of a student, 1 or as many as it takes; of those it does the ones from the
            strength on. A multi-step model does the share `strength` of these steps.
        guidance_scale: guidance scale of a multi-step model.
        negative_prompt: negative prompt of a multi-step model.
    """

    strength: float = STRENGTH
    num_inference_steps: int = 1
    guidance_scale: float = 1.0
    negative_prompt: str | None = None


def timestep_of(scheduler: SchedulerMixin, strength: float) -> int:
    """The timestep that a strength stands for: the last one for 1, the first one for almost 0.

    Raises:
        WadiError: the strength is not in (0, 1], or the schedule has no noise there. The schedule of a
            student with an alpha_T of its own has noise only at T.
    """
    if not 0 < strength <= 1:
        raise WadiError(f"strength: must be more than 0 and at most 1, but is {strength:g}")
    timestep = max(0, round(strength * scheduler.config.num_train_timesteps) - 1)
    if scheduler.alphas_cumprod[timestep] >= 1:
        raise WadiError(
            f"strength {strength:g}: this student has an alpha_T of its own, and its schedule has noise only "
            "at the last timestep; use strength 1, or the multi-step teacher"
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
    """Change each image so that it shows its prompt; the strength says how much is kept.

    Args:
        pipeline: a `StableDiffusionPipeline`, with the scheduler that the steps need (`load_for_steps`).
        prompts: N prompts.
        images: (N, 3, H, W) in [0, 1], float32; the autoencoder must take their sides (`fitted`).
        sampling: strength, steps and guidance.
        generators: N generators, one for each image.

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
    """Repaint the masked part of each image; the other pixels stay exactly as they are.

    The step starts from the whole noised image, so that the new object gets the background and the place of
    what was there. Afterwards the known latents are put back, as diffusers does after every step, and the
    known pixels are put back into the decoded image.

    Args:
        pipeline: as in `image_to_image`; its U-Net takes latents alone, and no mask.
        prompts: N prompts.
        images: (N, 3, H, W) in [0, 1], float32.
        masks: (N, 1, H, W), 1 where an image is repainted and 0 elsewhere.
        sampling: strength, steps and guidance.
        generators: N generators, one for each image.

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
    """How visible the edge of a mask is: the mean absolute difference of neighbouring pixels across the edge.

    Args:
        images: (N, C, H, W).
        masks: (N, 1, H, W), 0 or 1.

    Returns:
        (N,), in the unit of `images`; nan if a mask has no edge.
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
    image: Image.Image,
    sampling: Sampling,
    seed: int = 0,
    num_images: int = 1,
    batch_size: int = 8,
) -> list[Image.Image]:
    """Do `image_to_image` on one image several times; result i starts from the noise of `seed` + i.

    Args:
        pipeline: see `image_to_image`.
        prompt: prompt of the results.
        image: an image of a size that the model makes (`fitted`).
        sampling: strength, steps and guidance.
        seed: seed of the first result.
        num_images: number of results.
        batch_size: number of images that are made at once.
    """
    pixels, made = _to_tensor(image), []
    generators = seeded(seed, num_images)
    for first in range(0, num_images, batch_size):
        own = generators[first : first + batch_size]
        copies = pixels.expand(len(own), -1, -1, -1)
        made.append(image_to_image(pipeline, [prompt] * len(own), copies, sampling, own))
    return _to_images(torch.cat(made))


def repaintings(
    pipeline: DiffusionPipeline,
    prompt: str,
    image: Image.Image,
    mask: Image.Image,
    sampling: Sampling,
    seed: int = 0,
    num_images: int = 1,
    candidates: int = CANDIDATES,
    batch_size: int = 8,
) -> list[Image.Image]:
    """Do `inpaint` on one image several times; each result is the best of some candidates.

    One step does not see the surroundings of the mask when it places its object: sometimes the object is cut
    off, or the background has another colour. A step is cheap, so several candidates are made, and the one
    with the least `seam` is kept.

    Args:
        pipeline: see `inpaint`.
        prompt: prompt of the results.
        image: an image of a size that the model makes (`fitted`).
        mask: a mask of the same size, white where the image is repainted (`binary_mask`).
        sampling: strength, steps and guidance.
        seed: result i is the best of the seeds from seed + i * candidates on.
        num_images: number of results.
        candidates: number of candidates for each result.
        batch_size: number of images that are made at once.
    """
    pixels, masks, made = _to_tensor(image), _to_tensor(mask)[:, :1].round(), []
    total = num_images * candidates
    generators = seeded(seed, total)
    for first in range(0, total, batch_size):
        own = generators[first : first + batch_size]
        copies = [tensor.expand(len(own), -1, -1, -1) for tensor in (pixels, masks)]
        made.append(inpaint(pipeline, [prompt] * len(own), *copies, sampling, own))
    images = torch.cat(made)
    seams = seam(images, masks.expand(total, -1, -1, -1)).view(num_images, candidates)
    return _to_images(images[torch.arange(num_images) * candidates + seams.argmin(1)])


def fitted(
    pipeline: DiffusionPipeline,
    image: Image.Image,
    height: int | None = None,
    width: int | None = None,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Resize an image to a size that the model makes, by default its own; what does not fit is cut off.

    Raises:
        WadiError: not a Stable Diffusion pipeline, or a size that it cannot make.
    """
    _check_pipeline(pipeline)
    size = image_size(pipeline, height, width)[::-1]
    return image if image.size == size else ImageOps.fit(image, size, resample)


def binary_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """Make a grey mask black and white.

    Raises:
        WadiError: it has another size than the image, or there is nothing to repaint or nothing to keep.
    """
    if mask.size != image.size:
        raise WadiError(
            "MASK: is {} x {} pixels, and the image is {} x {}; draw the mask on the image".format(
                *mask.size, *image.size
            )
        )
    binary = mask.convert("L").point(lambda value: 255 if value >= 128 else 0)
    low, high = binary.getextrema()
    if high == 0:
        raise WadiError("MASK: is black all over, so nothing is repainted; paint white what shall change")
    if low == 255:
        raise WadiError("MASK: is white all over, so nothing is kept; use wadi image-to-image")
    return binary


def sheet(
    inputs: Sequence[tuple[str, Image.Image]], results: Sequence[Image.Image], columns: int = 4
) -> Image.Image:
    """Show inputs, each with its heading, and results side by side, `columns` results in a row."""
    cells = [image for _, image in inputs]
    rows = [("", [*cells, *results[start : start + columns]]) for start in range(0, len(results), columns)]
    return labelled_grid(rows, [*(heading for heading, _ in inputs), "result"])


def _stock(kind: type, pipeline: DiffusionPipeline, sampling: Sampling) -> DiffusionPipeline:
    """A pipeline of diffusers of another kind, on the parts of `pipeline`."""
    _check_pipeline(pipeline)
    own = pipeline.scheduler
    timestep_of(own, sampling.strength)
    steps = sampling.num_inference_steps
    if steps > 1 and not is_student(own) and int(steps * sampling.strength) < 1:
        raise WadiError(
            f"strength {sampling.strength:g}: leaves no step of {steps}; use at least {1 / steps:.3g}"
        )
    stock = kind(**pipeline.components, requires_safety_checker=False)
    stock.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return stock


def _check_pipeline(pipeline: DiffusionPipeline) -> None:
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise WadiError(
            f"--model: is a {type(pipeline).__name__}; images of images are made with a "
            "StableDiffusionPipeline, so name such a model"
        )
    if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise WadiError(
            f"--model: its U-Net takes {pipeline.unet.config.in_channels} channels, and latents have "
            f"{pipeline.vae.config.latent_channels}; name a model that was not made for inpainting alone"
        )
    if not isinstance(pipeline.unet.config.sample_size, int):
        raise WadiError(
            "--model: its own images are not square, and diffusers' pipelines for images of images need a "
            "model of square images; name another"
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
    count = sampling.num_inference_steps
    if is_student(stock.scheduler) or count == 1:
        student = StudentPipeline(stock)
        student.check_steps(count)
        begin = _begin(student.pipeline.scheduler, sampling.strength, count)
        return student(prompts, num_inference_steps=count, **begin, **options).float().cpu()
    steps = {"strength": sampling.strength, "num_inference_steps": count}
    output = stock(list(prompts), **steps, **options)
    tell_odd_output(output, [f"image of seed {each.initial_seed()}" for each in generators])
    return output.images.float().cpu()


def _begin(scheduler: SchedulerMixin, strength: float, count: int) -> dict[str, Any]:
    """What a call of a student needs to begin at a strength.

    One step is taken at the strength's own timestep. Of several, those are taken that come from the one that
    is nearest to it.
    """
    timestep = timestep_of(scheduler, strength)
    if count == 1:
        return {"strength": 1.0, "timesteps": [timestep]}
    distances = (step_times(scheduler, count) - timestep).abs()
    return {"strength": (count - int(distances.argmin())) / count}


def _noised(
    stock: DiffusionPipeline, images: torch.Tensor, strength: float, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Noised latents x_t of images, from the mode of the autoencoder's distribution."""
    vae, scheduler = stock.vae, stock.scheduler
    pixels = (2 * images - 1).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    noise = torch.cat([torch.randn(1, *latents.shape[1:], generator=each) for each in generators])
    timesteps = torch.full((len(images),), timestep_of(scheduler, strength), device=latents.device)
    return scheduler.add_noise(latents, noise.to(latents), timesteps)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """An image as (1, C, H, W) in [0, 1]."""
    return VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(image))


def _to_images(pixels: torch.Tensor) -> list[Image.Image]:
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))
