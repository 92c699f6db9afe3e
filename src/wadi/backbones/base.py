"""A diffusion model behind one call, `predict`: what training needs to know of an architecture."""

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
from wadi.backbones.storage import Precision, store_base
from wadi.backbones.text import PromptEncoder
from wadi.diffusion import Schedule
from wadi.errors import WadiError
from wadi.onestep.loading import load_pipeline, pipeline_class_name, pipeline_folder


class Backbone(ABC):
    """A text-to-image pipeline of which one network is distilled.

    Args:
        pipeline: a stock pipeline; its network is frozen, in the compute dtype and on the training device.
        device: where the text encoders and the VAE work while they are used; the VAE rests on the CPU.
        folder: where the pipeline was loaded from without its text encoders, which are then loaded for as
            long as they are used; ``None`` for a pipeline that holds them.

    Attributes:
        network: the frozen teacher.
        text: tokenizers and text encoders.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    network_name: ClassVar[str]
    """Name of the network in the pipeline."""
    network_class: ClassVar[type[nn.Module]]
    text_class: ClassVar[type[PromptEncoder]]
    blocks: ClassVar[tuple[str, ...]]
    """Class names of the repeated blocks: what is compiled, and where memory is saved by recomputing."""
    student_pattern: ClassVar[str]
    """Regular expression of the whole names of the linear layers that a student's adapter turns."""
    fake_pattern: ClassVar[str]
    """The same for the smaller selection that a fake model may have."""
    student_rank: ClassVar[int]
    """Rank of a student's adapter where nobody says another."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.network: nn.Module = getattr(pipeline, self.network_name)
        self.network.requires_grad_(False).eval().to(self.device)
        self.dtype = self.network.dtype
        self.text = self.text_class(pipeline, self.dtype, self.device, folder)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        precision: Precision | None = None,
    ) -> Backbone:
        """Load a pipeline folder or hub id without its text encoders; safetensors only, network in `dtype`.

        With a `precision`, what a student's adapter turns is stored in that, and widened when it is used.

        Raises:
            WadiError: as `load_pipeline` and `store_base`, or another architecture.
        """
        folder = pipeline_folder(name_or_path)
        name = pipeline_class_name(folder)
        if name != cls.pipeline_class.__name__:
            raise WadiError(f"{name_or_path}: holds a {name}; name a {cls.pipeline_class.__name__}")
        dtypes = {cls.network_name: dtype, "default": torch.float32}
        pipeline = load_pipeline(folder, dtypes, without=cls.text_class.parts)
        if precision is not None:
            network = getattr(pipeline, cls.network_name)
            names = cls.layers(network, cls.student_pattern)
            store_base(network, names, precision, device, folder / cls.network_name)
        return cls(pipeline, device, folder)

    @classmethod
    def drives(cls, network: nn.Module) -> bool:
        """Whether a network is of this architecture."""
        return isinstance(network, cls.network_class)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that the network was trained on."""
        size = self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.network.config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the network was trained on."""
        _, height, width = self.latent_shape
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    def schedule(self) -> Schedule:
        """The noise schedule of the pipeline's scheduler, on the CPU.

        Raises:
            WadiError: a kind of schedule that is not supported; see `Schedule.from_config`.
        """
        _, height, width = self.latent_shape
        patch = self.network.config.get("patch_size") or 1
        return Schedule.from_config(self.pipeline.scheduler, (height // patch) * (width // patch))

    def encode(self, prompts: list[str]) -> Condition:
        """Conditions of prompts, on the CPU; see `PromptEncoder.encode`."""
        return self.text.encode(prompts)

    def null(self) -> Condition:
        """The condition of no prompt, first dimension 1, on the CPU; see `PromptEncoder.null`."""
        return self.text.null()

    @abstractmethod
    def predict(
        self, network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """What `network` predicts for N noisy latents.

        Args:
            network: the teacher, or a view of it with an adapter.
            x_t: (N, C, H, W), any float dtype.
            t: (N,), what the network is told of the time: see `Schedule.timestep`.
            condition: of N prompts, on the network's device.

        Returns:
            (N, C, H, W) float32; its meaning is the schedule's `prediction_type`.
        """

    @classmethod
    def layers(cls, network: nn.Module, pattern: str) -> list[str]:
        """Names of the linear layers of a network that a pattern names, with or without an adapter in it."""
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
        """Latents as the network has them, (N, C, H, W), from those that the VAE encodes to."""
        config = self.pipeline.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `scaled`, by the operations of the stock pipeline."""
        config = self.pipeline.vae.config
        latents = latents / config.scaling_factor
        return latents if config.shift_factor is None else latents + config.shift_factor

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Clean latents (N, C, H, W) of images, float32 on the CPU: the mean of the VAE's posterior, scaled.

        Images are enlarged or reduced until they cover `image_size`; what is beyond is cut off evenly.
        """
        vae, latents = self.pipeline.vae.to(self.device), []
        height, width = self.image_size
        for image in images:
            fitted = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
            pixels = self.pipeline.image_processor.preprocess(fitted).to(self.device, torch.float32)
            latents.append(self.scaled(vae.encode(pixels).latent_dist.mean).cpu())
        vae.to("cpu")
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int = 16) -> list[Image.Image]:
        """Images of clean latents (N, C, H, W), decoded in float32 as diffusers' pipeline does."""
        vae = self.pipeline.vae.to(self.device)
        parts = self.unscaled(latents.float()).split(batch_size)
        pixels = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
        vae.to("cpu")
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")
