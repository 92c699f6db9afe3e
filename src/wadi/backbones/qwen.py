"""Qwen-Image: a rectified flow in packed latents of a video VAE, conditioned on a masked Qwen2.5-VL."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import nn

from wadi.backbones.base import Backbone
from wadi.backbones.condition import MASK, STATES, Condition
from wadi.backbones.flux import pack, unpack
from wadi.backbones.text import PromptEncoder, padded


class TemplatePrompts(PromptEncoder):
    """The states of Qwen2.5-VL behind the pipeline's instruction, (N, 512, D), and their mask.

    No prompt is a blank, as the model's authors have it: the pipeline is guided by a negative prompt alone.
    """

    large = "text_encoder"
    no_prompt = " "
    dimensions: ClassVar[dict[str, int]] = {STATES: 3, MASK: 2}

    def facts(self) -> list[object]:
        """See `PromptEncoder.facts`."""
        pipeline = self.pipeline
        return [*super().facts(), pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx]

    def _encode(self, prompts: list[str]) -> Condition:
        states, mask = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.length
        )
        lengths = [states.shape[1]] * len(states) if mask is None else mask.sum(1).tolist()
        return padded([s[:length] for s, length in zip(states, lengths, strict=True)], self.length)


class QwenImageBackbone(Backbone):
    """Qwen-Image (arXiv 2508.02324).

    The published scheduler gives no number at one step: a student ships another.

    A student turns every linear layer of the blocks that a gradient reaches, and the fake model's smaller
    selection leaves out their modulation: 471 M and 317 M parameters at rank 64.
    """

    pipeline_class, network_name = QwenImagePipeline, "transformer"
    network_class, text_class = QwenImageTransformer2DModel, TemplatePrompts
    blocks = tuple(QwenImageTransformer2DModel._repeated_blocks)
    student_rank = 64
    cudnn_attention = False
    student_pattern = r"transformer_blocks\.\d+\..*"
    fake_pattern = r"transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)\..*"
    patch = 2

    @classmethod
    def layers(cls, network: nn.Module, pattern: str) -> list[str]:
        """See `Backbone.layers`; without those whose result the last block drops: they get no gradient."""
        last = f"transformer_blocks.{len(network.transformer_blocks) - 1}."
        dropped = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        unused = {last + name for name in dropped}
        return [name for name in super().layers(network, pattern) if name not in unused]

    @property
    def channels(self) -> int:
        """See `Backbone.channels`: of the network's tokens, each is four latents."""
        return self.network.config.in_channels // 4

    def guided(self, null: torch.Tensor, cond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        """See `Backbone.guided`; each token then has the length of the prompt's own prediction."""
        height, width = cond.shape[-2:]
        tokens, own = pack(super().guided(null, cond, scale)), pack(cond)
        length, wanted = (value.norm(dim=-1, keepdim=True) for value in (tokens, own))
        return unpack(tokens * (wanted / length), height, width)

    def predict(
        self,
        network: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        guidance: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backbone.predict`; t is 1000 sigma, and rounded to the compute dtype as the pipeline does."""
        n, _, height, width = x_t.shape
        tokens = network(
            hidden_states=pack(x_t.to(self.dtype)),
            timestep=t.to(self.dtype) / 1000,
            encoder_hidden_states=condition[STATES].to(self.dtype),
            encoder_hidden_states_mask=condition[MASK],
            img_shapes=[[(1, height // 2, width // 2)]] * n,
            return_dict=False,
        )[0]
        return unpack(tokens.float(), height, width)

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Backbone.scaled`."""
        mean, deviation = self._statistics(latents)
        return (latents - mean) / deviation

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Backbone.unscaled`."""
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the VAE's latents, (1, C, 1, 1)."""
        config = self.pipeline.vae.config
        values = (config.latents_mean, config.latents_std)
        return tuple(latents.new_tensor(value).view(1, -1, 1, 1) for value in values)

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Backbone._encoded`: of a video of one frame."""
        return super()._encoded(pixels.unsqueeze(2)).squeeze(2)

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """See `Backbone._decoded`: of a video of one frame."""
        return super()._decoded(latents.unsqueeze(2)).squeeze(2)
