"""Stable Diffusion XL: a U-Net told the states of two CLIPs, a pooled embedding, and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from wadi.backbones.condition import STATES, Condition
from wadi.backbones.sd import UNetBackbone
from wadi.backbones.text import PromptEncoder

POOLED = "text_embeds"


class TwoClipPrompts(PromptEncoder):
    """The last but one states of both CLIPs side by side, (N, 77, D), and the second's projection (N, P)."""

    parts = ("text_encoder", "text_encoder_2")
    dimensions: ClassVar[dict[str, int]] = {STATES: 3, POOLED: 2}

    def _encode(self, prompts: list[str]) -> Condition:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        return {STATES: states, POOLED: pooled}

    def null(self, empty: Condition | None = None) -> Condition:
        """See `PromptEncoder.null`: zeros, where the pipeline's `force_zeros_for_empty_prompt` says so."""
        empty = super().null(empty)
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}


class SDXLBackbone(UNetBackbone):
    """Stable Diffusion XL (arXiv 2307.01952).

    The network is told that its images have the size that it was trained on, whole and not cut.

    Student and fake model turn the linear layers of attention and feed-forward: 128.98 M parameters of the
    base model at rank 64.
    """

    pipeline_class, text_class = StableDiffusionXLPipeline, TwoClipPrompts
    addition = "text_time"
    student_rank = 64
    student_pattern = UNetBackbone.fake_pattern

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        resolution: int | None = None,
    ) -> None:
        super().__init__(pipeline, device, folder, resolution)
        height, width = self.image_size
        # original size, corner of what was cut out, size; made here: a CUDA graph cannot copy from the host
        self.time_ids = torch.tensor(
            [[height, width, 0, 0, height, width]], dtype=self.dtype, device=self.device
        )

    def added(self, condition: Condition) -> Condition:
        """See `UNetBackbone.added`."""
        pooled = condition[POOLED].to(self.dtype)
        return {POOLED: pooled, "time_ids": self.time_ids.expand(len(pooled), -1)}

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Backbone.scaled`; some fine-tuned VAEs have a mean and a deviation of each channel."""
        mean, deviation = self._statistics(latents)
        return (latents - mean) * self.pipeline.vae.config.scaling_factor / deviation

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Backbone.unscaled`."""
        mean, deviation = self._statistics(latents)
        return latents * deviation / self.pipeline.vae.config.scaling_factor + mean

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the VAE's latents, (1, C, 1, 1); 0 and 1 where its configuration has none."""
        config, channels = self.pipeline.vae.config, latents.shape[1]
        mean, deviation = config.latents_mean, config.latents_std
        if mean is None or deviation is None:
            mean, deviation = [0.0] * channels, [1.0] * channels
        return tuple(latents.new_tensor(value).view(1, -1, 1, 1) for value in (mean, deviation))
