"""Images steered by condition maps: ControlNets (arXiv 2302.05543) on a one-step student.

A ControlNet that was trained on the multi-step teacher adds to the same places of the student's U-Net, which
stays as it is. The pipeline is diffusers' own `StableDiffusionControlNetPipeline`; what is here makes
condition maps, loads ControlNets and says where they do not fit, and measures how well an image keeps to its
map.
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
from PIL import Image, ImageOps

from wadi.errors import WadiError
from wadi.images import open_picture as open_picture
from wadi.onestep import OneStepPipeline, labelled_grid
from wadi.onestep.arguments import seeded
from wadi.onestep.components import load_module
from wadi.onestep.loading import part_folder
from wadi.onestep.output import tell_odd_output

Value = TypeVar("Value")

CANNY = (100, 200)
"""Lower and upper threshold of edges, of a gradient in 8-bit steps: those of the first ControlNets."""

Condition = Literal["canny", "map"]
"""What a condition map is made of: the edges of an image, or a map that is ready."""

SHARED_FIELDS = (
    "in_channels",
    "cross_attention_dim",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
)
"""Fields that must be the same in the configurations of a ControlNet and its U-Net."""


def canny(pixels: np.ndarray, low: float = CANNY[0], high: float = CANNY[1]) -> np.ndarray:
    """Edges after Canny, by OpenCV; of colours, the channel that changes most counts.

    Args:
        pixels: (H, W, 3) or (H, W) uint8.
        low: a pixel whose gradient is above this belongs to an edge that is connected to a sure one.
        high: a pixel whose gradient is above this is surely on an edge.

    Returns:
        (H, W) uint8, 255 on edges and 0 elsewhere.

    Raises:
        WadiError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise WadiError(
            "edges: OpenCV is not installed; pip install opencv-python-headless, or give "
            "a map that is ready (--condition map)"
        ) from error
    return cv2.Canny(np.ascontiguousarray(pixels), low, high)


def edge_map(image: Image.Image, low: float = CANNY[0], high: float = CANNY[1]) -> Image.Image:
    """The condition of a Canny ControlNet: white edges on black, RGB, of the image's size; see `canny`."""
    return Image.fromarray(canny(np.asarray(image.convert("RGB")), low, high)).convert("RGB")


def condition_map(
    image: Image.Image,
    kind: Condition,
    size: tuple[int, int],
    low: float = CANNY[0],
    high: float = CANNY[1],
) -> Image.Image:
    """The condition map of an image, for a pipeline that makes images of `size`.

    Args:
        image: of any size; what does not fit the shape of `size` is cut off on both sides.
        kind: "canny" finds the edges of the image at `size`; "map" takes the image for the map itself.
        size: width and height in pixels.
        low: threshold of `canny`.
        high: threshold of `canny`.

    Returns:
        RGB, of `size`.

    Raises:
        WadiError: thresholds out of order, or OpenCV is not installed.
    """
    if not 0 <= low <= high:
        raise WadiError(f"edges: thresholds must be in order and not negative, but are {low} and {high}")
    fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)
    return edge_map(fitted, low, high) if kind == "canny" else fitted


def load_controlnet(
    name: str | os.PathLike, pipeline: DiffusionPipeline, torch_dtype: torch.dtype | None = None
) -> ControlNetModel:
    """Load a ControlNet for a pipeline, safetensors only, onto the pipeline's device.

    Args:
        name: folder or hub id of a `ControlNetModel`.
        pipeline: whose U-Net, or whose teacher's, it was trained with.
        torch_dtype: of its weights; float32 when ``None``.

    Raises:
        WadiError: as `load_module`, or it is for another U-Net or autoencoder.
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
            f"{name}: shrinks its condition {factor} times, and the model's autoencoder images "
            f"{pipeline.vae_scale_factor} times; name a ControlNet that was trained with this model"
        )


def _plain(value: Any) -> Any:
    """Lists, as JSON has them, and tuples alike."""
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _unet(pipeline: DiffusionPipeline) -> UNet2DConditionModel:
    if not isinstance(pipeline, (StableDiffusionPipeline, StableDiffusionControlNetPipeline)):
        raise WadiError(
            f"controlnet: the model is a {type(pipeline).__name__}; ControlNets of this kind steer the U-Net "
            "of a StableDiffusionPipeline"
        )
    return pipeline.unet


def with_controlnets(
    pipeline: StableDiffusionPipeline, controlnets: Sequence[ControlNetModel]
) -> StableDiffusionControlNetPipeline:
    """diffusers' ControlNet pipeline on the parts of another pipeline, its scheduler too: one step stays one.

        student = OneStepPipeline.from_pretrained("runs/mine/pipeline")
        student.pipeline = with_controlnets(student.pipeline, [load_controlnet(name, student.pipeline)])
        image = student("a lighthouse", seed=0, image=edge_map(image))[0]

    Args:
        pipeline: left as it is; the modules are shared.
        controlnets: one or several. What several add is summed (`MultiControlNetModel`); the pipeline's
            `image` and `controlnet_conditioning_scale` are then lists, one for each.

    Raises:
        WadiError: not a Stable Diffusion pipeline, or no ControlNet.
    """
    if not controlnets:
        raise WadiError("controlnet: name at least one")
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
    num_inference_steps: int = 1,
    guidance_scale: float = 1.0,
    negative_prompt: str | None = None,
) -> list[Image.Image]:
    """Make images that keep to condition maps.

    Args:
        pipeline: of `with_controlnets`, with the scheduler that the steps need (`load_for_steps`).
        prompt: what they show.
        maps: a condition map for each ControlNet, of the size that the images shall have.
        conditioning_scale: for each ControlNet, how much of what it adds is added; 0 is the model alone.
        seed: image i starts from the noise of seed + i.
        num_images: how many.
        batch_size: how many at once.
        num_inference_steps: 1 for a student.
        guidance_scale: of a multi-step model.
        negative_prompt: likewise.

    Raises:
        WadiError: guidance in one step, a seed that is not possible, or the prompt is too long for the
            tokenizer.
    """
    alone = not isinstance(pipeline.controlnet, MultiControlNetModel)
    options = {
        "image": maps[0] if alone else list(maps),
        "controlnet_conditioning_scale": float(conditioning_scale[0]) if alone else list(conditioning_scale),
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }
    images = []
    for first in range(0, num_images, batch_size):
        count, own = min(batch_size, num_images - first), seed + first
        if num_inference_steps == 1:
            images += OneStepPipeline(pipeline)(prompt, own, num_images_per_prompt=count, **options)
            continue
        made = pipeline(
            prompt,
            num_inference_steps=num_inference_steps,
            num_images_per_prompt=count,
            generator=seeded(own, count),
            **options,
        )
        tell_odd_output(made, [f"image of seed {own + i}" for i in range(count)])
        images += made.images
    return images


def one_for_each(name: str, values: Sequence[Value], count: int) -> list[Value]:
    """Values of an option, one for each of `count` ControlNets; a single value is for all of them.

    Raises:
        WadiError: neither one nor `count` values.
    """
    if len(values) not in (1, count):
        wanted = "one" if count == 1 else f"one, or one for each of {count} ControlNets"
        raise WadiError(f"{name}: {len(values)} given; name {wanted}")
    return list(values) * (count if len(values) == 1 else 1)


def sheet(
    pictures: Sequence[Image.Image],
    kinds: Sequence[Condition],
    maps: Sequence[Image.Image],
    images: Sequence[Image.Image],
    columns: int = 4,
) -> Image.Image:
    """Show side by side what steered and what came of it: images, condition maps, results.

    Args:
        images: for each ControlNet, of any size; shown once where several have the same, and not at all
            where they are the map.
        kinds: what of each image is the condition.
        maps: the condition maps, all of one size.
        images: the results, of that size.
        columns: results in a row.
    """
    size, headings, cells = maps[0].size, [], []
    for picture, kind, condition in zip(pictures, kinds, maps, strict=True):
        fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
        if kind == "canny" and fitted not in cells:
            headings.append("picture")
            cells.append(fitted)
        headings.append("edges" if kind == "canny" else "map")
        cells.append(condition)
    rows = [("", [*cells, *images[start : start + columns]]) for start in range(0, len(images), columns)]
    return labelled_grid(rows, [*headings, "result"])


def layout_map(boxes: torch.Tensor, size: int) -> torch.Tensor:
    """The condition of a layout ControlNet: a white box for each object, on black.

    Args:
        boxes: (N, K, 4) float, left, top, right and lower edge as fractions of the side; a box whose right
            edge is not right of its left one is no object.
        size: side of the maps in pixels.

    Returns:
        (N, size, size) bool on the device of `boxes`: whether a pixel's centre is in a box.
    """
    axis = (torch.arange(size, device=boxes.device) + 0.5) / size
    left, top, right, lower = boxes[..., None].unbind(2)
    columns, rows = (left < axis) & (axis < right), (top < axis) & (axis < lower)
    return (rows[..., :, None] & columns[..., None, :]).any(1)


def edge_agreement(condition: torch.Tensor, result: torch.Tensor, tolerance: int = 1) -> torch.Tensor:
    """How well the edges of images agree with those that were asked for: F1, harmonic mean of two shares.

    Precision is the share of a result's edge pixels that have one of the condition within `tolerance` pixels
    (to the side, up or down, and diagonally), recall the share of the condition's that have one of the
    result.

    Args:
        condition: (N, H, W), edges where not zero.
        result: likewise.
        tolerance: pixels.

    Returns:
        (N,) float64 in [0, 1]; 1 where neither has an edge, 0 where only one has.
    """
    condition, result = (edges[:, None] != 0 for edges in (condition, result))

    def found(edges: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        near = F.max_pool2d(others.float(), 2 * tolerance + 1, 1, tolerance) > 0
        return (edges & near).sum((1, 2, 3)).double() / edges.sum((1, 2, 3)).clamp(min=1)

    precision, recall = found(result, condition), found(condition, result)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    nothing = ~condition.flatten(1).any(1) & ~result.flatten(1).any(1)
    return torch.where(nothing, 1.0, f1)
