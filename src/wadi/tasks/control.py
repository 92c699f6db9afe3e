"""Images steered by condition maps: ControlNets (arXiv 2302.05543) on a one-step student.

A ControlNet that was trained on the multi-step teacher adds its outputs at the same places of the student's
U-Net, which stays as it is. The pipeline is diffusers' own `StableDiffusionControlNetPipeline`. This module
makes condition maps, loads ControlNets and checks whether they fit, and measures how well an image follows
its map.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from wadi.errors import WadiError
from wadi.onestep import StudentPipeline
from wadi.onestep.arguments import seeded
from wadi.onestep.components import load_module
from wadi.onestep.loading import part_folder
from wadi.onestep.output import tell_odd_output
from wadi.onestep.student import is_student
from wadi.tasks import editing
from wadi.tasks.exemplars import cropped

Value = TypeVar("Value")

CANNY = (100, 200)
"""Lower and upper threshold of edges, as gradients in 8-bit steps; those of the first ControlNets."""

Condition = Literal["canny", "map"]
"""How a condition map is made: from the edges of an image, or the image is the map itself."""

SHARED_FIELDS = (
    "in_channels",
    "cross_attention_dim",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
)
"""Fields that must be equal in the configurations of a ControlNet and its U-Net."""


def canny(pixels: np.ndarray, low: float = CANNY[0], high: float = CANNY[1]) -> np.ndarray:
    """Find edges by Canny's method with OpenCV; the colour channel that changes most counts.

    Args:
        pixels: (H, W, 3) or (H, W) uint8.
        low: pixels with a gradient above this are on an edge if they are connected to a certain edge.
        high: pixels with a gradient above this are certainly on an edge.

    Returns:
        (H, W) uint8, 255 on edges and 0 elsewhere.

    Raises:
        WadiError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise WadiError(
            "edges: OpenCV is not installed; pip install opencv-python-headless, or give a condition map "
            "instead of an image (--condition map)"
        ) from error
    return cv2.Canny(np.ascontiguousarray(pixels), low, high)


def edge_map(image: Image.Image, low: float = CANNY[0], high: float = CANNY[1]) -> Image.Image:
    """The condition map of a Canny ControlNet: white edges on black, RGB, of the same size; see `canny`."""
    return Image.fromarray(canny(np.asarray(image.convert("RGB")), low, high)).convert("RGB")


def condition_map(
    image: Image.Image,
    kind: Condition,
    size: tuple[int, int],
    low: float = CANNY[0],
    high: float = CANNY[1],
) -> Image.Image:
    """Make the condition map of an image, for a pipeline that makes images of `size`.

    Args:
        image: an image of any size; what does not fit into `size` is cut off on both sides.
        kind: "canny" finds the edges of the image at `size`; "map" means that the image is the map itself.
        size: width and height in pixels.
        low: lower threshold of `canny`.
        high: upper threshold of `canny`.

    Returns:
        RGB, of `size`.

    Raises:
        WadiError: thresholds out of order, or OpenCV is not installed.
    """
    if not 0 <= low <= high:
        raise WadiError(f"--low {low}, --high {high}: the thresholds must be in order, and not negative")
    fitted = cropped(image.convert("RGB"), *size[::-1])
    return edge_map(fitted, low, high) if kind == "canny" else fitted


def load_controlnet(
    name: str | os.PathLike, pipeline: DiffusionPipeline, torch_dtype: torch.dtype | None = None
) -> ControlNetModel:
    """Load a ControlNet for a pipeline, safetensors only, onto the pipeline's device.

    Args:
        name: folder or hub id of a `ControlNetModel`.
        pipeline: the model that it was trained with, or a student of that model.
        torch_dtype: dtype of its weights; float32 when ``None``.

    Raises:
        WadiError: as `load_module`, or it was made for another U-Net or autoencoder.
    """
    folder = part_folder(name, "ControlNet")
    controlnet = load_module(ControlNetModel, folder, torch_dtype or torch.float32)
    _check_fit(os.fspath(name), controlnet, pipeline)
    return controlnet.to(pipeline.device).requires_grad_(False)


def _check_fit(name: str, controlnet: ControlNetModel, pipeline: DiffusionPipeline) -> None:
    unet = _unet(pipeline)
    for field in SHARED_FIELDS:
        own, other = _plain(unet.config[field]), _plain(controlnet.config[field])
        if own != other:
            raise WadiError(
                f"{name}: is for a U-Net whose {field} is {other}, and the model's is {own}; name a "
                "ControlNet that was trained with this model"
            )
    factor = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    if factor != pipeline.vae_scale_factor:
        raise WadiError(
            f"{name}: shrinks its condition {factor} times, and the model's autoencoder shrinks images "
            f"{pipeline.vae_scale_factor} times; name a ControlNet that was trained with this model"
        )


def _plain(value: Any) -> Any:
    """The value with tuples instead of the lists of JSON."""
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _unet(pipeline: DiffusionPipeline) -> UNet2DConditionModel:
    if not isinstance(pipeline, (StableDiffusionPipeline, StableDiffusionControlNetPipeline)):
        raise WadiError(
            f"--controlnet: the model is a {type(pipeline).__name__}, and these ControlNets steer the U-Net "
            "of a StableDiffusionPipeline; name such a model"
        )
    return pipeline.unet


def with_controlnets(
    pipeline: StableDiffusionPipeline, controlnets: Sequence[ControlNetModel]
) -> StableDiffusionControlNetPipeline:
    """Put ControlNets on a pipeline: diffusers' ControlNet pipeline with the same parts and scheduler.

        student = StudentPipeline.from_pretrained("runs/mine/pipeline")
        student.pipeline = with_controlnets(student.pipeline, [load_controlnet(name, student.pipeline)])
        result = student("a lighthouse", seed=0, image=edge_map(image))[0]

    Args:
        pipeline: the pipeline, which stays as it is; the modules are shared.
        controlnets: one or several. The outputs of several are added up (`MultiControlNetModel`), and the
            pipeline's `image` and `controlnet_conditioning_scale` are then lists with a value for each.

    Raises:
        WadiError: not a Stable Diffusion pipeline, or no ControlNet.
    """
    if not controlnets:
        raise WadiError("--controlnet: name at least one")
    _unet(pipeline)
    steered = StableDiffusionControlNetPipeline(
        **{name: part for name, part in pipeline.components.items() if name != "controlnet"},
        controlnet=controlnets[0] if len(controlnets) == 1 else list(controlnets),
        requires_safety_checker=False,
    )
    steered.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return steered


def steer(
    pipeline: StableDiffusionControlNetPipeline,
    prompt: str,
    maps: Sequence[Image.Image],
    conditioning_scale: Sequence[float],
    seed: int = 0,
    num_images: int = 1,
    batch_size: int = 8,
    sampling: editing.Sampling = editing.Sampling(),  # noqa: B008 - immutable
) -> list[Image.Image]:
    """Make images that follow condition maps.

    Args:
        pipeline: a pipeline from `with_controlnets`, with the scheduler that the steps need
            (`load_for_steps`).
        prompt: prompt of the images.
        maps: a condition map for each ControlNet, of the size of the images.
        conditioning_scale: for each ControlNet, the factor of what it adds; with 0 it adds nothing.
        seed: image i starts from the noise of seed + i.
        num_images: number of images.
        batch_size: number of images that are made at once.
        sampling: steps and guidance.

    Raises:
        WadiError: guidance of a student, more steps than it takes, an impossible seed, or a prompt that is
            too long.
    """
    alone = not isinstance(pipeline.controlnet, MultiControlNetModel)
    options = {
        "image": maps[0] if alone else list(maps),
        "controlnet_conditioning_scale": float(conditioning_scale[0]) if alone else list(conditioning_scale),
        "guidance_scale": sampling.guidance_scale,
        "negative_prompt": sampling.negative_prompt,
    }
    images, steps = [], sampling.num_inference_steps
    for first in range(0, num_images, batch_size):
        count, own = min(batch_size, num_images - first), seed + first
        options["num_images_per_prompt"] = count
        if steps == 1 or is_student(pipeline.scheduler):
            images += StudentPipeline(pipeline)(prompt, own, num_inference_steps=steps, **options)
            continue
        made = pipeline(prompt, num_inference_steps=steps, generator=seeded(own, count), **options)
        tell_odd_output(made, [f"image of seed {own + i}" for i in range(count)])
        images += made.images
    return images


def one_for_each(name: str, values: Sequence[Value], count: int) -> list[Value]:
    """The values of an option for `count` ControlNets; a single value is for all of them.

    Raises:
        WadiError: neither one nor `count` values.
    """
    if len(values) not in (1, count):
        wanted = "one" if count == 1 else f"one, or one for each of {count} ControlNets"
        raise WadiError(f"{name}: {len(values)} given; name {wanted}")
    return list(values) * (count if len(values) == 1 else 1)


def sheet(
    sources: Sequence[Image.Image],
    kinds: Sequence[Condition],
    maps: Sequence[Image.Image],
    results: Sequence[Image.Image],
) -> Image.Image:
    """Show side by side the images that steered, their condition maps, and the results.

    Args:
        sources: the image for each ControlNet, of any size. The same image is shown once, and an image that
            is the map itself is not shown again.
        kinds: how the map of each is made.
        maps: the condition maps, all of one size.
        results: the results, of that size.
    """
    cells: list[tuple[str, Image.Image]] = []
    for source, kind, condition in zip(sources, kinds, maps, strict=True):
        fitted = cropped(source, *maps[0].size[::-1])
        if kind == "canny" and ("image", fitted) not in cells:
            cells.append(("image", fitted))
        cells.append(("edges" if kind == "canny" else "map", condition))
    return editing.sheet(cells, results)


def layout_map(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """The condition map of a layout ControlNet: a white box for each object, on black.

    Args:
        boxes: (N, K, 4) float, left, top, right and lower edge as fractions of the side; a box without a
            width stands for no object.
        size: side of the maps in pixels.

    Returns:
        (N, size, size) bool on the device of `boxes`: whether a pixel's centre is in a box.
    """
    axis = (torch.arange(size, device=boxes.device) + 0.5) / size
    left, top, right, lower = boxes[..., None].unbind(2)
    columns, rows = (left < axis) & (axis < right), (top < axis) & (axis < lower)
    return (rows[..., :, None] & columns[..., None, :]).any(1)


def edge_agreement(condition: torch.Tensor, result: torch.Tensor, tolerance: int = 1) -> torch.Tensor:
    """How well the edges of images follow the condition: F1, the harmonic mean of precision and recall.

    Precision is the share of edge pixels of a result with an edge pixel of the condition within `tolerance`
    pixels in each direction. Recall is the share of edge pixels of the condition with one of the result.

    Args:
        condition: (N, H, W), not zero on edges.
        result: (N, H, W), not zero on edges.
        tolerance: distance in pixels.

    Returns:
        (N,) float64 in [0, 1]; 1 if neither has an edge, 0 if only one has.
    """
    condition, result = (edges[:, None] != 0 for edges in (condition, result))

    def found(edges: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        near = F.max_pool2d(others.float(), 2 * tolerance + 1, 1, tolerance) > 0
        return (edges & near).sum((1, 2, 3)).double() / edges.sum((1, 2, 3)).clamp(min=1)

    precision, recall = found(result, condition), found(condition, result)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    nothing = ~condition.flatten(1).any(1) & ~result.flatten(1).any(1)
    return torch.where(nothing, 1.0, f1)
