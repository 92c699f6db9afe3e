"""The base class of all backbones: what training needs to know about an architecture."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import nn

from wadi.backbones.condition import Condition
from wadi.backbones.storage import check_storage, store_base
from wadi.backbones.text import PromptEncoder
from wadi.device import Precision
from wadi.diffusion import Schedule
from wadi.errors import WadiError
from wadi.onestep.arguments import own_size, size_step, whole_number
from wadi.onestep.loading import load_pipeline, pipeline_class_name, pipeline_folder

SINGLY_ABOVE = 256
"""Pixels: images with a longer side are decoded one by one."""
WHOLE, TILE = 512, 384
"""Pixels: the VAE decodes images with a side longer than `WHOLE` in tiles whose side is `TILE`."""


def guided(null: torch.Tensor, cond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance, p = p_null + s (p_cond - p_null); a tensor s is (N, 1, 1, 1)."""
    return null + scale * (cond - null)


class Backbone(ABC):
    """A text-to-image pipeline with the network that is distilled.

    Args:
        pipeline: a stock pipeline. Its network is frozen, has the compute dtype, and is on the training
            device.
        device: the device for the text encoders and the VAE while they are used. Otherwise the VAE is on the
            CPU.
        folder: the folder of a pipeline that was loaded without its text encoders. They are then loaded only
            while they are used. ``None`` for a pipeline that holds them.
        resolution: pixels a side of the images, for a network that makes images of any size; ``None`` for the
            pipeline's own default.

    Attributes:
        network: the frozen teacher.
        text: tokenizers and text encoders.
        image_size: height and width in pixels of the images that are trained.

    Raises:
        WadiError: `resolution` is not a multiple of what the model takes, or the network has its own size.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    network_name: ClassVar[str]
    """Name of the network in the pipeline."""
    network_class: ClassVar[type[nn.Module]]
    text_class: ClassVar[type[PromptEncoder]]
    blocks: ClassVar[tuple[str, ...]]
    """Class names of the repeated blocks. They are compiled, and recomputed by gradient checkpointing."""
    student_pattern: ClassVar[str]
    """Regular expression for the full names of the linear layers that a student's adapter turns."""
    fake_pattern: ClassVar[str]
    """The same for the smaller selection of layers that a fake model may have."""
    student_rank: ClassVar[int]
    """Default rank of a student's adapter."""
    cudnn_attention: ClassVar[bool] = True
    """Whether cuDNN's attention may be used. With heads of 128 channels, as FLUX.1 has, its backward failed
    in a CUDA graph with torch 2.11."""
    capturable: ClassVar[bool] = True
    """Whether `predict` never waits for the device, so that a CUDA graph can hold it."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        resolution: int | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.network: nn.Module = getattr(pipeline, self.network_name)
        self.network.requires_grad_(False).eval().to(self.device)
        self.dtype = self.network.dtype
        self.text = self.text_class(pipeline, self.dtype, self.device, folder)
        self.image_size = own_size(pipeline) if resolution is None else self._square(resolution)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        resolution: int | None = None,
        precision: Precision | None = None,
    ) -> Backbone:
        """Load a pipeline folder or hub id without its text encoders; safetensors only, network in `dtype`.

        With a `precision`, what a student's adapter turns is stored in that, and widened when it is used.

        Raises:
            WadiError: as `load_pipeline` and `store_base`, the pipeline is of another class, or the
                network has another size.
        """
        folder = pipeline_folder(name_or_path)
        name = pipeline_class_name(folder)
        if name != cls.pipeline_class.__name__:
            raise WadiError(f"{name_or_path}: holds a {name}; name a {cls.pipeline_class.__name__}")
        dtypes = {cls.network_name: dtype, "default": torch.float32}
        pipeline = load_pipeline(folder, dtypes, without=cls.text_class.parts)
        backbone = cls(pipeline, "cpu", folder, resolution)
        backbone.work_on(device)
        backbone.place(device, precision)
        return backbone

    def work_on(self, device: torch.device | str) -> None:
        """Let text encoders and VAE be used on another device; the network stays where it is."""
        self.device = self.text.device = torch.device(device)

    def place(self, device: torch.device | str, precision: Precision | None = None) -> None:
        """Move the network to a device; with a `precision`, see `store_base`, its layers are stored small.

        Raises:
            WadiError: as `store_base`.
        """
        if precision is not None:
            store_base(self.network, self.student_layers(), precision, device, self._network_folder)
        self.network.requires_grad_(False).eval().to(device)

    def check_storage(self, precision: Precision | None, device: torch.device | str) -> None:
        """Raise what `place` would raise; nothing is moved."""
        if precision is not None:
            check_storage(self.network, self.student_layers(), precision, device, self._network_folder)

    @property
    def _network_folder(self) -> Path | None:
        return self.text.folder and self.text.folder / self.network_name

    @classmethod
    def drives(cls, network: nn.Module) -> bool:
        """Whether a network is of this architecture."""
        return isinstance(network, cls.network_class)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents of images of `image_size`, as they are noised."""
        height, width = (side // self.pixels for side in self.image_size)
        return self.channels, height, width

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.network.config.in_channels

    @property
    def pixels(self) -> int:
        """Pixels of an image, on each side, that one latent stands for."""
        return self.pipeline.vae_scale_factor

    @property
    def patch(self) -> int:
        """Latents, on each side, that are one token of the network."""
        return self.network.config.get("patch_size") or 1

    def schedule(self) -> Schedule:
        """The noise schedule of the pipeline's scheduler, on the CPU.

        Raises:
            WadiError: this kind of schedule is not supported; see `Schedule.from_config`.
        """
        _, height, width = self.latent_shape
        return Schedule.from_config(self.pipeline.scheduler, (height // self.patch) * (width // self.patch))

    def encode(self, prompts: list[str]) -> Condition:
        """Conditions of prompts, on the CPU; see `PromptEncoder.encode`."""
        return self.text.encode(prompts)

    def null(self) -> Condition:
        """The condition without a prompt, with first dimension 1, on the CPU; see `PromptEncoder.null`."""
        return self.text.null()

    @property
    def takes_guidance(self) -> bool:
        """Whether the network takes the guidance scale as an input, and is called once for it.

        The student and the fake model are then told the stock pipeline's default, with which the student
        will be sampled; the teacher is told the guidance that it is asked for.
        """
        return False

    def guided(self, null: torch.Tensor, cond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        """Combine predictions (N, C, H, W) of no prompt and of the prompt: the function `guided`."""
        return guided(null, cond, scale)

    @abstractmethod
    def predict(
        self,
        network: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        guidance: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `network` predicts for N noisy latents.

        Args:
            network: the teacher, or a view of it with an adapter.
            x_t: (N, C, H, W), any float dtype.
            t: (N,), the time as diffusers' schedulers count it; see `Schedule.timestep`.
            condition: the condition of N prompts, on the network's device.
            guidance: the guidance scale for a network that `takes_guidance`, a number or N of them. ``None``
                is the default of the stock pipeline. Other networks do not use it.

        Returns:
            (N, C, H, W) float32; its meaning is the schedule's `prediction_type`.
        """

    @classmethod
    def layers(cls, network: nn.Module, pattern: str) -> list[str]:
        """Names of the linear layers of a network that match a pattern. The network may have an adapter."""
        # a layer that already carries an adapter keeps its nn.Linear one level down
        names = (
            n.removesuffix(".base_layer") for n, m in network.named_modules() if isinstance(m, nn.Linear)
        )
        return [name for name in names if re.fullmatch(pattern, name)]

    def student_layers(self) -> list[str]:
        """Names of the layers that a student's adapter turns."""
        return self.layers(self.network, self.student_pattern)

    def fake_layers(self) -> list[str]:
        """Names of the smaller selection of layers for a fake model: attention and feed-forward alone."""
        return self.layers(self.network, self.fake_pattern)

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Scale latents (N, C, H, W) of the VAE to those of the network."""
        config = self.pipeline.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `scaled`, by the operations of the stock pipeline."""
        config = self.pipeline.vae.config
        latents = latents / config.scaling_factor
        return latents if config.get("shift_factor") is None else latents + config.shift_factor

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the VAE encodes images (N, 3, H, W) in [-1, 1] to: the mean of its posterior."""
        return self.pipeline.vae.encode(pixels).latent_dist.mean

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [-1, 1] of latents as the VAE has them."""
        return self.pipeline.vae.decode(latents, return_dict=False)[0]

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Clean latents (N, C, H, W) of images, float32 on the CPU: the mean of the VAE's posterior, scaled.

        Images are resized until they cover `image_size`, and then cropped equally on both sides.
        """
        self.pipeline.vae.to(self.device)
        latents, (height, width) = [], self.image_size
        for image in images:
            fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
            pixels = self.pipeline.image_processor.preprocess(fitted).to(self.device, torch.float32)
            latents.append(self.scaled(self._encoded(pixels)).cpu())
        self.pipeline.vae.to("cpu")
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int = 16) -> list[Image.Image]:
        """Images of clean latents (N, C, H, W), decoded in float32 as diffusers' pipeline does.

        Images above `SINGLY_ABOVE` are decoded one by one. Those above `WHOLE` are decoded in overlapping
        tiles, which differs slightly from decoding them whole.
        """
        vae, longest = self.pipeline.vae.to(self.device), self.pixels * max(latents.shape[-2:])
        if longest > WHOLE:
            vae.enable_tiling()
            if hasattr(vae, "tile_sample_min_size"):  # of an AutoencoderKL: as large as an image
                side = min(TILE, vae.tile_sample_min_size)
                vae.tile_latent_min_size = side * vae.tile_latent_min_size // vae.tile_sample_min_size
                vae.tile_sample_min_size = side
        parts = latents.float().split(1 if longest > SINGLY_ABOVE else batch_size)
        pixels = [self._decoded(self.unscaled(part)).cpu() for part in parts]
        vae.disable_tiling()
        vae.to("cpu")
        return self.pipeline.image_processor.postprocess(torch.cat(pixels), output_type="pil")

    def _square(self, resolution: int) -> tuple[int, int]:
        """A resolution that the user asks for, as height and width."""
        step, own = size_step(self.pipeline), own_size(self.pipeline)
        side = whole_number("--resolution", resolution, step)
        if side % step:
            raise WadiError(f"--resolution {side}: must be a multiple of {step} for this model")
        if self.network.config.get("sample_size") is not None and (side, side) != own:
            raise WadiError(
                f"--resolution {side}: this model makes images of {own[0]} x {own[1]} pixels; omit the option"
            )
        return side, side
