"""Stable Diffusion 3 and 3.5: a rectified flow, conditioned on two CLIPs and a T5."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

from wadi.backbones.base import Backbone
from wadi.backbones.condition import STATES, Condition
from wadi.backbones.text import PromptEncoder

POOLED = "pooled_projections"


class ThreePrompts(PromptEncoder):
    """States (N, 77 + 256, D), those of both CLIPs side by side and then T5's, and pooled ones (N, P).

    The number of T5's tokens is the pipeline's own; the network has no mask, so another is another model.
    """

    parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    large = "text_encoder_3"
    dimensions: ClassVar[dict[str, int]] = {STATES: 3, POOLED: 2}

    def _encode(self, prompts: list[str]) -> Condition:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            *(prompts, None, None),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.length,
        )
        return {STATES: states, POOLED: pooled}


class SD3Backbone(Backbone):
    """Stable Diffusion 3 (arXiv 2403.03206).

    A student turns every linear layer of the blocks, and the fake model's smaller selection leaves out their
    modulation: 92.95 M and 62.67 M parameters of SD3 medium at rank 64.
    """

    pipeline_class, network_name = StableDiffusion3Pipeline, "transformer"
    network_class, text_class = SD3Transformer2DModel, ThreePrompts
    blocks = ("JointTransformerBlock",)
    student_rank = 64
    student_pattern = r"transformer_blocks\.\d+\..*"
    fake_pattern = r"transformer_blocks\.\d+\.(attn2?|ff|ff_context)\..*"

    @classmethod
    def layers(cls, network: nn.Module, pattern: str) -> list[str]:
        """See `Backbone.layers`; without the layer that reads the text's queries in the last block.

        What the last block makes of the text is dropped, so no gradient would ever reach that layer.
        """
        unused = f"transformer_blocks.{len(network.transformer_blocks) - 1}.attn.add_q_proj"
        return [name for name in super().layers(network, pattern) if name != unused]

    def predict(
        self,
        network: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        guidance: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backbone.predict`; t is 1000 sigma."""
        return network(
            hidden_states=x_t.to(self.dtype),
            timestep=t,
            encoder_hidden_states=condition[STATES].to(self.dtype),
            pooled_projections=condition[POOLED].to(self.dtype),
            return_dict=False,
        )[0].float()
