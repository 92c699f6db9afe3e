"""Sana: a rectified flow in latents of 32 pixels, conditioned on a masked Gemma."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from torch import nn

from wadi.backbones.base import Backbone
from wadi.backbones.condition import MASK, STATES, Condition
from wadi.backbones.text import PromptEncoder
from wadi.onestep.loading import call_default

INSTRUCTION: list[str] = call_default(SanaPipeline, "complex_human_instruction")
"""What the stock pipeline's call writes before a prompt; its `encode_prompt` alone does not."""


class GemmaPrompts(PromptEncoder):
    """The states of Gemma, (N, 300, D), and their mask, after an instruction whose own states are dropped.

    No prompt is encoded without the instruction, as the pipeline encodes its negative prompt.
    """

    large = "text_encoder"
    dimensions: ClassVar[dict[str, int]] = {STATES: 3, MASK: 2}

    def facts(self) -> list[object]:
        """See `PromptEncoder.facts`."""
        return [*super().facts(), INSTRUCTION]

    def _encode(self, prompts: list[str]) -> Condition:
        told = self._states(prompts, INSTRUCTION)
        if self.no_prompt not in prompts:
            return told
        none = self._states([self.no_prompt], None)
        empty = torch.tensor([text == self.no_prompt for text in prompts], device=self.device)
        return {
            name: torch.where(empty.view(-1, *[1] * (tensor.ndim - 1)), none[name], tensor)
            for name, tensor in told.items()
        }

    def _states(self, prompts: list[str], instruction: list[str] | None) -> Condition:
        states, mask, *_ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.length,
            complex_human_instruction=instruction,
        )
        return {STATES: states, MASK: mask}


class SanaBackbone(Backbone):
    """Sana (arXiv 2410.10629).

    Student and fake model turn the linear layers of the blocks, which is attention: 34.4 M parameters of the
    model with 1.6 B at rank 64. The feed-forward of Sana consists of convolutions.
    """

    pipeline_class, network_name = SanaPipeline, "transformer"
    network_class, text_class = SanaTransformer2DModel, GemmaPrompts
    blocks = ("SanaTransformerBlock",)
    student_rank = 64
    student_pattern = fake_pattern = r"transformer_blocks\.\d+\..*"

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
            x_t.to(self.dtype),
            encoder_hidden_states=condition[STATES].to(self.dtype),
            encoder_attention_mask=condition[MASK],
            timestep=t * self.network.config.timestep_scale,
            return_dict=False,
        )[0].float()

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Backbone._encoded`: there is no posterior."""
        return self.pipeline.vae.encode(pixels).latent
