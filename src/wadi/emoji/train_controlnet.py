"""`wadi emoji train-controlnet`: a ControlNet (arXiv 2302.05543) for the teacher of the small world.

The teacher stays as it is. Captions name the objects and sometimes the background; where the objects are, how
big and how turned, only the condition says.
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

from wadi.diffusion import Schedule
from wadi.emoji import teacher_folder
from wadi.emoji.captions import RELATIONS, Caption, Split, sample_captions, stated
from wadi.emoji.clock import TimedSteps, warmup_cosine
from wadi.emoji.glyphs import load_atlas
from wadi.emoji.scenes import IMAGE_SIZE, Scenes, render, sample_scenes
from wadi.emoji.train_teacher import tokenize
from wadi.emoji.updates import AveragedAdamW
from wadi.errors import WadiError
from wadi.graph import record
from wadi.onestep.loading import load_pipeline
from wadi.onestep.saving import forget_origin
from wadi.outputs import Output
from wadi.progress import progress
from wadi.tasks.control import canny, layout_map

ENCODED_BATCH = 2000
"""Images at a time when latents and conditions are computed ahead."""

EMBEDDING_CHANNELS = (16, 32, 96, 256)
"""ControlNet's own, of the layers that shrink a condition; each but the first halves it."""


@dataclass
class TrainControlNetConfig:
    """Train a ControlNet that steers the emoji teacher and its students; write its folder."""

    out: Path
    """ControlNetModel folder to write (float16 safetensors)."""
    condition: Literal["canny", "layout"] = "canny"
    """What steers: edges of the image, or a white box where each object is."""
    teacher: Path | None = None
    """StableDiffusionPipeline folder of the emoji world; the shipped teacher if not given."""
    atlas: Path | None = None
    """Atlas file of `wadi emoji atlas`; drawn from the font if not given."""
    seconds: float = 150.0
    """Training time, without the images and conditions that are made ahead."""
    max_train_steps: int = 1_000_000
    """Stop after this many steps even if time is left."""
    train_batch_size: int = 256
    """Latents a step."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW; falls to zero along a cosine of the time used."""
    ema_decay: float = 0.999
    """Decay of the average of the weights, which is written."""
    loss: Literal["epsilon", "balanced"] = "balanced"
    """The usual mean square error of epsilon, or that times sigma_t / alpha_t. The teacher's own error falls
    from 0.045 at t = 100 to 0.002 at the last; balanced, it is about as large at every t, and what the
    condition decides is learned sooner."""
    pictures: int = 150_000
    """Images made ahead, with their latents and conditions."""
    captions: int = 100_000
    """Captions drawn for them."""
    seed: int = 0
    """Seed of everything that is random."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    overwrite: bool = False
    """Replace the folder if this command wrote it and nothing else is in it."""


def open_captions(count: int, seed: int | str, split: Split = "train") -> list[Caption]:
    """Captions that name the objects and half the time the background, and leave the rest to a condition."""
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
    """(N, 2, 4) left, top, right and lower edge of each object, fractions of the side; zeros for none."""
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
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor() as threads:  # OpenCV works without Python's lock
        edges = np.stack(list(threads.map(canny, pixels)))
    return torch.from_numpy(edges > 0).to(images.device)


def pack_bits(maps: torch.Tensor) -> torch.Tensor:
    """(N, H, W) bool, H W a multiple of 8, to (N, H W / 8) uint8, the first pixel in the highest bit."""
    weights = 2 ** torch.arange(7, -1, -1, device=maps.device)
    return (maps.reshape(len(maps), -1, 8) * weights).sum(2).to(torch.uint8)


def unpack_bits(packed: torch.Tensor, size: int) -> torch.Tensor:
    """Undo `pack_bits`: (N, size, size) bool."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).reshape(len(packed), size, size).bool()


def new_controlnet(pipeline: StableDiffusionPipeline) -> ControlNetModel:
    """A ControlNet that does nothing yet: a copy of the U-Net's inner half behind zero convolutions.

    Its first layers shrink the condition as the pipeline's autoencoder does images (the built-in one 4
    times, Stable Diffusion's 8 times).
    """
    levels = int(math.log2(pipeline.vae_scale_factor)) + 1
    return ControlNetModel.from_unet(
        pipeline.unet, conditioning_embedding_out_channels=EMBEDDING_CHANNELS[:levels]
    )


@torch.no_grad()
def make_pool(
    config: TrainControlNetConfig, pipeline: StableDiffusionPipeline
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fresh scenes, on the device.

    Returns:
        Latents (N, 4, 16, 16) bfloat16, tokens of their captions (N, 24) int64, and condition maps packed to
        bits (N, 512) uint8.
    """
    device = torch.device(config.device)
    atlas = load_atlas(config.atlas).to(device).float() / 255
    generator = torch.Generator(device).manual_seed(config.seed)
    captions = open_captions(config.captions, "controlnet")
    tokens = tokenize(pipeline.tokenizer, [caption.text for caption in captions]).to(device)
    columns = {name: column.to(device) for name, column in stated(captions).items()}
    parts = []
    size = min(ENCODED_BATCH, config.pictures)
    for _ in progress(range(math.ceil(config.pictures / size)), desc="images", unit="batch"):
        index = torch.randint(len(captions), (size,), generator=generator, device=device)
        scenes = sample_scenes({name: column[index] for name, column in columns.items()}, generator)
        images = render(scenes, atlas)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = pipeline.vae.encode(2 * images - 1).latent_dist.mean
        latents = (latents * pipeline.vae.config.scaling_factor).bfloat16()
        parts.append((latents, tokens[index], pack_bits(conditions(config.condition, scenes, images))))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class ControlNetTraining:
    """One training step of a ControlNet, captured as a CUDA graph where there is a GPU.

    The loss is w_t || eps(x_t, t, c, condition) - n ||^2 with the teacher's U-Net frozen, mean over elements;
    w_t is 1 or sigma_t / alpha_t.
    """

    def __init__(
        self, config: TrainControlNetConfig, pipeline: StableDiffusionPipeline, controlnet: ControlNetModel
    ):
        self.device = torch.device(config.device)
        self.unet, self.text_encoder, self.controlnet = pipeline.unet, pipeline.text_encoder, controlnet
        self.balanced = config.loss == "balanced"
        self.update = AveragedAdamW(controlnet.parameters(), config.ema_decay, self.device)
        self.schedule = Schedule.from_config(pipeline.scheduler).to(self.device)
        self.empty = tokenize(pipeline.tokenizer, [""]).to(self.device)
        size, side = config.train_batch_size, pipeline.unet.config.sample_size
        self.latents = torch.zeros(size, pipeline.unet.config.in_channels, side, side, device=self.device)
        self.noise = torch.zeros_like(self.latents)
        self.timesteps = torch.zeros(size, dtype=torch.int64, device=self.device)
        self.ids = self.empty.repeat(size, 1)
        self.packed = torch.zeros(size, IMAGE_SIZE**2 // 8, dtype=torch.uint8, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        # the learning rate is zero before the first step: nothing comes of the runs before the recording
        self.run = record(self._step)[0].replay if self.device.type == "cuda" else self._step

    def _step(self) -> None:
        alpha, sigma = self.schedule.levels(self.timesteps)
        noisy = self.schedule.add_noise(self.latents, self.noise, self.timesteps)
        maps = unpack_bits(self.packed, IMAGE_SIZE)[:, None].float().expand(-1, 3, -1, -1)
        # cache_enabled: a captured graph must not keep casts of weights from an earlier step.
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False
        ):
            with torch.no_grad():
                states = self.text_encoder(self.ids)[0]
            down, middle = self.controlnet(noisy, self.timesteps, states, maps, return_dict=False)
            prediction = self.unet(
                noisy,
                self.timesteps,
                states,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
        weight = sigma / alpha if self.balanced else torch.ones_like(sigma)
        loss = (weight * (prediction.float() - self.noise).square()).mean()
        self.update(loss)
        self.loss.copy_(loss.detach())

    def step(
        self,
        latents: torch.Tensor,
        ids: torch.Tensor,
        packed: torch.Tensor,
        step: int,
        rate: float,
        generator: torch.Generator,
    ) -> None:
        """Draw timesteps and noise, leave out a tenth of the captions, and update.

        Args:
            latents: (N, 4, 16, 16).
            ids: (N, 24) int64.
            packed: (N, 512) uint8, condition maps of `pack_bits`.
            step: how many came before.
            rate: the learning rate.
            generator: of timesteps, noise and what is left out.
        """
        size = len(latents)
        self.latents.copy_(latents)
        self.noise.copy_(torch.randn(latents.shape, generator=generator, device=self.device))
        self.timesteps.copy_(self.schedule.sample_t(size, 0.0, 1.0, generator))
        drop = torch.rand(size, 1, generator=generator, device=self.device) < 0.1
        self.ids.copy_(torch.where(drop, self.empty, ids))
        self.packed.copy_(packed)
        self.update.prepare(step, rate)
        self.run()


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
        WadiError: the teacher is not one of the emoji world, or there is neither font nor atlas, or no OpenCV
            for edges, or a count is below 1.
    """
    for name in ("pictures", "captions", "train_batch_size"):
        if getattr(config, name) < 1:
            raise WadiError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    inputs = (config.teacher, config.atlas)
    output = Output(config.out, "emoji train-controlnet", inputs, config.overwrite)
    output.check()
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    pipeline = _load_teacher(config)
    pool = make_pool(config, pipeline)
    controlnet = new_controlnet(pipeline).to(config.device).train()
    training = ControlNetTraining(config, pipeline, controlnet)
    generator = torch.Generator(config.device).manual_seed(config.seed + 1)
    steps = TimedSteps(config.seconds, config.max_train_steps, "controlnet")
    for step, used in steps:
        index = torch.randint(
            len(pool[0]), (config.train_batch_size,), generator=generator, device=config.device
        )
        rate = config.learning_rate * warmup_cosine(step, used, 100)
        latents, ids, packed = (column[index] for column in pool)
        training.step(latents.float(), ids, packed, step, rate, generator)
        steps.show(training.loss)
    for parameter, average in zip(training.update.parameters, training.update.ema, strict=True):
        parameter.data.copy_(average)
    write_controlnet(output, controlnet)
    return {"steps": steps.done, "seconds": steps.elapsed, "loss": training.loss.item()}


def write_controlnet(output: Output, controlnet: ControlNetModel) -> None:
    """Write a ControlNetModel folder in float16, whole or not at all."""
    with output.writing() as temporary:
        controlnet.half().save_pretrained(temporary, safe_serialization=True)
        forget_origin(temporary)
