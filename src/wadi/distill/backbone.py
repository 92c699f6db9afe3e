"""A diffusion model behind one call, `predict`: what the trainer needs to know of an architecture."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from wadi.errors import WadiError
from wadi.onestep.pipeline import load_pipeline


class UNetBackbone:
    """Stable Diffusion: a `UNet2DConditionModel` conditioned on CLIP text embeddings, and an `AutoencoderKL`.

    Args:
        pipeline: a stock pipeline; its U-Net is frozen, in the compute dtype and on the training device.
        device: where the text encoder and the VAE work while they are used; they rest on the CPU.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, device: torch.device | str = "cpu") -> None:
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.network: UNet2DConditionModel = pipeline.unet
        self.network.requires_grad_(False).eval().to(self.device)
        self.dtype = self.network.dtype
        self.scheduler_config = pipeline.scheduler.config

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> UNetBackbone:
        """Load a `StableDiffusionPipeline` folder or hub id; weights from safetensors only, U-Net in `dtype`.

        Raises:
            WadiError: no such folder or id, a missing sub-folder, no safetensors weights, or another
                architecture.
        """
        pipeline = load_pipeline(name_or_path, {"unet": dtype, "default": torch.float32})
        if not isinstance(pipeline, StableDiffusionPipeline):
            raise WadiError(
                f"{name_or_path}: holds a {type(pipeline).__name__}; name a StableDiffusionPipeline"
            )
        if pipeline.unet.config.in_channels != pipeline.unet.config.out_channels:
            raise WadiError(
                f"{name_or_path}: the U-Net takes {pipeline.unet.config.in_channels} channels and gives "
                f"{pipeline.unet.config.out_channels}; inpainting and similar models are not supported"
            )
        pipeline.safety_checker = None
        return cls(pipeline, device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that the network was trained on."""
        size = self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.network.config.in_channels, height, width

    def predict(
        self, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """What `network` predicts for latents (N, C, H, W), timesteps (N,) and text (N, L, D); float32."""
        x_t, condition = x_t.to(self.dtype), condition.to(self.dtype)
        output = network(x_t, t, encoder_hidden_states=condition, return_dict=False)
        return output[0].float()

    def encode(self, prompts: list[str], batch_size: int = 128) -> torch.Tensor:
        """Text embeddings (N, L, D) on the CPU, in the compute dtype, padded as diffusers pads them."""
        encoder = self.pipeline.text_encoder.to(self.device)
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        with torch.no_grad():
            embeddings = [self.pipeline.encode_prompt(b, self.device, 1, False)[0].cpu() for b in batches]
        encoder.to("cpu")
        return torch.cat(embeddings).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int = 16) -> list[Image.Image]:
        """Pictures of clean latents (N, C, H, W), decoded in float32 as diffusers' pipeline does."""
        vae = self.pipeline.vae.to(self.device)
        scaled = latents.float() / vae.config.scaling_factor
        pixels = torch.cat([vae.decode(part, return_dict=False)[0] for part in scaled.split(batch_size)])
        vae.to("cpu")
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")
