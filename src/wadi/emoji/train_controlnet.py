"""`wadi emoji train-controlnet`: a ControlNet (arXiv 2302.05543) for the teacher of the emoji world.

The teacher stays as it is. Captions name the objects and sometimes the background. Only the condition says
where the objects are, how big they are and how they are turned.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline

from wadi.emoji import teacher_folder
from wadi.emoji.captions import RELATIONS, Caption, Split, sample_captions
from wadi.emoji.clock import TimedSteps, warmup_cosine
from wadi.emoji.scenes import IMAGE_SIZE, Scenes, to_bytes
from wadi.emoji.tokenizer import tokenize
from wadi.emoji.training import LatentTraining, TrainOptions, encoded_scenes, joined, prepare_torch
from wadi.errors import WadiError
from wadi.onestep.arguments import whole_number
from wadi.onestep.loading import load_pipeline
from wadi.onestep.saving import forget_origin
from wadi.outputs import Output
from wadi.tasks.control import canny, layout_map

EMBEDDING_CHANNELS = (16, 32, 96, 256)
"""Channels of the layers that shrink a condition, as in ControlNet; each layer but the first halves it."""


@dataclass
class TrainControlNetConfig(TrainOptions):
    """Train a ControlNet that steers the emoji teacher and its students; write its folder."""

    out: Path
    """ControlNetModel folder to write (float16 safetensors)."""
    condition: Literal["canny", "layout"] = "canny"
    """What steers the image: its edges (canny), or a white box for each object (layout)."""
    teacher: Path | None = None
    """StableDiffusionPipeline folder of the emoji world; the built-in teacher if not given."""
    seconds: float = 150.0
    """Training time, without the time to make the images and conditions."""
    train_batch_size: int = 256
    """Latents in each step."""
    learning_rate: float = 5e-4
    """Highest learning rate of AdamW; it falls to zero along a cosine of the time used."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is written."""
    loss: Literal["epsilon", "balanced"] = "balanced"
    """epsilon: the usual mean squared error of the noise; balanced: the same times sigma_t / alpha_t, which
    weighs all noise levels alike, because the teacher's own error falls from 0.045 at t = 100 to 0.002 at
    the last timestep. The balanced loss learns sooner what the condition decides."""
    pictures: int = 150_000
    """Number of images that are made before the training, with their latents and conditions."""
    captions: int = 100_000
    """Number of different captions among them."""


def open_captions(count: int, seed: int | str, split: Split = "train") -> list[Caption]:
    """Captions that name the objects, and half of them the background; a condition decides the rest."""
    return [
        replace(
            caption,
            size=None,
            place=None,
            relation=None if caption.relation is None else RELATIONS.index("and"),
        )
        for caption in sample_captions(count, seed, split)
    ]


def scene_boxes(scenes: Scenes) -> torch.Tensor:
    """Boxes (N, 2, 4) of objects: left, top, right and lower edge as fractions of the image's side.

    The box of a missing second object is all zeros.
    """
    half = scenes.size[..., None] / 2
    boxes = torch.cat([scenes.center - half, scenes.center + half], 2)
    return boxes * (scenes.emoji >= 0)[..., None]


def conditions(kind: str, scenes: Scenes, images: torch.Tensor) -> torch.Tensor:
    """Condition maps of images.

    Args:
        kind: "canny" or "layout".
        scenes: N scenes.
        images: (N, 3, H, W) in [0, 1], their images; edges are those of their 8-bit form.

    Returns:
        (N, H, W) bool on the images' device.
    """
    if kind == "layout":
        return layout_map(scene_boxes(scenes), images.shape[-1])
    pixels = to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor() as threads:  # OpenCV releases Python's lock
        edges = np.stack(list(threads.map(canny, pixels)))
    return torch.from_numpy(edges > 0).to(images.device)


def pack_bits(maps: torch.Tensor) -> torch.Tensor:
    """Pack maps (N, H, W) bool, H W a multiple of 8, into (N, H W / 8) uint8, the highest bit first."""
    weights = 2 ** torch.arange(7, -1, -1, device=maps.device)
    return (maps.reshape(len(maps), -1, 8) * weights).sum(2).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, size: int) -> torch.Tensor:
    """Undo `pack_bits`: (N, size, size) bool."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).reshape(len(packed), size, size).bool()


def new_controlnet(pipeline: StableDiffusionPipeline) -> ControlNetModel:
    """A ControlNet that changes nothing yet: a copy of the U-Net's encoder, followed by zero convolutions.

    Its first layers shrink the condition by the factor of the pipeline's autoencoder, which is 4 for the
    built-in one and 8 for Stable Diffusion's.
    """
    levels = int(math.log2(pipeline.vae_scale_factor)) + 1
    return ControlNetModel.from_unet(
        pipeline.unet, conditioning_embedding_out_channels=EMBEDDING_CHANNELS[:levels]
    )


def make_pool(config: TrainControlNetConfig, pipeline: StableDiffusionPipeline) -> tuple[torch.Tensor, ...]:
    """Draw and encode scenes before the training.

    Returns:
        Latents (N, 4, 16, 16) bfloat16, tokens of their captions (N, 24) int64, and condition maps packed to
        bits (N, 512) uint8; on the device.
    """
    captions = open_captions(config.captions, "controlnet")
    tokens = tokenize(pipeline.tokenizer, [caption.text for caption in captions]).to(config.device)
    batches = encoded_scenes(config, pipeline.vae, captions, config.pictures, config.seed)
    return joined(
        (latents, tokens[index], pack_bits(conditions(config.condition, scenes, images)))
        for latents, index, scenes, images in batches
    )


class ControlNetTraining(LatentTraining):
    """The training of a ControlNet on a frozen teacher: w_t is 1, or sigma_t / alpha_t if balanced."""

    def __init__(
        self, config: TrainControlNetConfig, pipeline: StableDiffusionPipeline, controlnet: ControlNetModel
    ):
        unet, empty = pipeline.unet, tokenize(pipeline.tokenizer, [""])
        side = unet.config.sample_size
        shape = (unet.config.in_channels, side, side)
        super().__init__(config, controlnet.parameters(), pipeline.scheduler, empty, shape)
        self.unet, self.text_encoder, self.controlnet = unet, pipeline.text_encoder, controlnet
        size = config.train_batch_size
        self.packed = torch.zeros(size, IMAGE_SIZE**2 // 8, dtype=torch.uint8, device=self.device)
        self.start()

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `LatentTraining.predict`."""
        maps = unpack_bits(self.packed, IMAGE_SIZE)[:, None].float().expand(-1, 3, -1, -1)
        with torch.no_grad():
            states = self.text_encoder(self.ids[:, 0])[0]
        down, middle = self.controlnet(noisy, timesteps, states, maps, return_dict=False)
        return self.unet(
            noisy,
            timesteps,
            states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    def weighted(self, error: torch.Tensor) -> torch.Tensor:
        """See `LatentTraining.weighted`."""
        alpha, sigma = self.schedule.levels(self.times)
        return error * (sigma / alpha) if self.config.loss == "balanced" else error


def _load_teacher(config: TrainControlNetConfig) -> StableDiffusionPipeline:
    folder = config.teacher or teacher_folder()
    pipeline = load_pipeline(folder)
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise WadiError(f"--teacher {folder}: is a {type(pipeline).__name__}; ControlNets steer a U-Net")
    kind = pipeline.scheduler.config.prediction_type
    pixels = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if kind != "epsilon" or pixels != IMAGE_SIZE:
        raise WadiError(
            f"--teacher {folder}: predicts {kind} at {pixels} px; this training is for teachers of the emoji "
            f"world, epsilon at {IMAGE_SIZE} px (for Stable Diffusion, see diffusers' examples/controlnet)"
        )
    for name in ("unet", "text_encoder", "vae"):
        getattr(pipeline, name).requires_grad_(False)
    return pipeline.to(config.device)


def train_controlnet(config: TrainControlNetConfig) -> dict[str, float]:
    """Train and write the folder; returns steps, seconds and the last loss.

    Raises:
        WadiError: the teacher is not one of the emoji world, there is neither font nor atlas, OpenCV is
            missing for edges, or a count is below 1.
    """
    for name in ("pictures", "captions", "train_batch_size"):
        whole_number(f"--{name.replace('_', '-')}", getattr(config, name), 1)
    inputs = (config.teacher, config.atlas)
    output = Output(config.out, "emoji train-controlnet", inputs, config.overwrite)
    output.check()
    device = prepare_torch(config)
    pipeline = _load_teacher(config)
    pool = make_pool(config, pipeline)
    controlnet = new_controlnet(pipeline).to(device).train()
    training = ControlNetTraining(config, pipeline, controlnet)
    generator = torch.Generator(device).manual_seed(config.seed + 1)
    steps = TimedSteps(config.seconds, config.max_train_steps, "controlnet")
    for step, used in steps:
        index = torch.randint(len(pool[0]), (config.train_batch_size,), generator=generator, device=device)
        latents, ids, packed = (column[index] for column in pool)
        training.packed.copy_(packed)
        rate = config.learning_rate * warmup_cosine(step, used, 100)
        training.step(latents.float(), ids[:, None], step, rate, generator)
        steps.show(training.loss)
    for parameter, average in zip(training.parameters, training.ema, strict=True):
        parameter.data.copy_(average)
    write_controlnet(output, controlnet)
    return {"steps": steps.done, "seconds": steps.elapsed, "loss": training.loss.item()}


def write_controlnet(output: Output, controlnet: ControlNetModel) -> None:
    """Write a ControlNetModel folder in float16, whole or not at all."""
    with output.writing() as temporary:
        controlnet.half().save_pretrained(temporary, safe_serialization=True)
        forget_origin(temporary)
