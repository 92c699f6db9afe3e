"""A diffusion model behind one call, `predict`: what the trainer needs to know of an architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, StableDiffusionPipeline
from PIL import Image

from wadi.distill.condition import Condition
from wadi.distill.text import PromptEncoder
from wadi.errors import WadiError
from wadi.onestep.loading import load_pipeline, pipeline_class_name, pipeline_folder


class Backbone(ABC):
    """A text-to-image pipeline of which one network is distilled.

    Args:
        pipeline: a stock pipeline; its network is frozen, in the compute dtype and on the training device.
        device: where the text encoder and the VAE work while they are used; the VAE rests on the CPU.
        folder: where the pipeline was loaded from without its text encoder, which is then loaded for as long
            as it is used; ``None`` for a pipeline that holds its text encoder.

    Attributes:
        network: the frozen teacher.
        text: tokenizer and text encoder.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    network_name: ClassVar[str]

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.network: torch.nn.Module = getattr(pipeline, self.network_name)
        self.network.requires_grad_(False).eval().to(self.device)
        self.dtype = self.network.dtype
        self.scheduler_config = pipeline.scheduler.config
        self.text = PromptEncoder(pipeline, self.dtype, self.device, folder)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Backbone:
        """Load a pipeline folder or hub id without its text encoder; safetensors only, network in `dtype`.

        Raises:
            WadiError: as `load_pipeline`, or another architecture.
        """
        folder = pipeline_folder(name_or_path)
        name = pipeline_class_name(folder)
        if name != cls.pipeline_class.__name__:
            raise WadiError(f"{name_or_path}: holds a {name}; name a {cls.pipeline_class.__name__}")
        dtypes = {cls.network_name: dtype, "default": torch.float32}
        return cls(load_pipeline(folder, dtypes, without=("text_encoder",)), device, folder)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that the network was trained on."""
        size = self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.network.config.in_channels, height, width

    @abstractmethod
    def predict(
        self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """What `network` predicts for latents (N, C, H, W), timesteps (N,) and N prompts; float32."""

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int = 16) -> list[Image.Image]:
        """Pictures of clean latents (N, C, H, W), decoded in float32 as diffusers' pipeline does."""
        vae = self.pipeline.vae.to(self.device)
        scaled = latents.float() / vae.config.scaling_factor
        pixels = torch.cat([vae.decode(part, return_dict=False)[0] for part in scaled.split(batch_size)])
        vae.to("cpu")
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")


class UNetBackbone(Backbone):
    """Stable Diffusion: a `UNet2DConditionModel` conditioned on CLIP text embeddings."""

    pipeline_class = StableDiffusionPipeline
    network_name = "unet"

    def predict(
        self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """See `Backbone.predict`."""
        states = condition["encoder_hidden_states"].to(self.dtype)
        return network(x_t.to(self.dtype), t, encoder_hidden_states=states, return_dict=False)[0].float()


class PixArtBackbone(Backbone):
    """PixArt-alpha (arXiv 2310.00426): a `PixArtTransformer2DModel` conditioned on masked T5 embeddings.

    Its output holds a learned variance behind the noise, which one step has no use for. Where the network
    takes micro-conditions (1024 px), it is told the size of the pictures that it was trained on.
    """

    pipeline_class = PixArtAlphaPipeline
    network_name = "transformer"

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
    ) -> None:
        super().__init__(pipeline, device, folder)
        self.added: Condition = {}
        if self.network.use_additional_conditions:
            _, height, width = (size * pipeline.vae_scale_factor for size in self.latent_shape)
            # made here: a CUDA graph cannot hold a copy from the host
            values = {"resolution": [[height, width]], "aspect_ratio": [[height / width]]}
            self.added = {
                name: torch.tensor(value, dtype=self.dtype, device=self.device)
                for name, value in values.items()
            }

    def predict(
        self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """See `Backbone.predict`."""
        added = {name: value.expand(len(x_t), -1) for name, value in self.added.items()}
        output = network(
            x_t.to(self.dtype),
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            encoder_attention_mask=condition["encoder_attention_mask"],
            timestep=t,
            added_cond_kwargs=added or {"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]].float()


BACKBONES: dict[str, type[Backbone]] = {
    backbone.pipeline_class.__name__: backbone for backbone in (UNetBackbone, PixArtBackbone)
}
"""By the pipeline class in model_index.json."""


def load_backbone(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Backbone:
    """Load whatever kind of pipeline a folder or hub id holds; see `Backbone.from_pretrained`.

    Raises:
        WadiError: a class of pipeline that cannot be distilled, or as for `Backbone.from_pretrained`.
    """
    folder = pipeline_folder(name_or_path)
    name = pipeline_class_name(folder)
    if name not in BACKBONES:
        raise WadiError(f"{name_or_path}: holds a {name}; name a {' or a '.join(BACKBONES)}")
    return BACKBONES[name].from_pretrained(folder, dtype, device)
