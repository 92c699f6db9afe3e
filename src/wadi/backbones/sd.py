"""Stable Diffusion 1 and 2: a U-Net conditioned on the text embeddings of one CLIP."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from wadi.backbones.base import Backbone
from wadi.backbones.condition import STATES, Condition
from wadi.backbones.text import PromptEncoder

ATTENTION_AND_FEED_FORWARD = r"to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2"


class ClipPrompts(PromptEncoder):
    """The states of CLIP, (N, 77, D)."""

    def _encode(self, prompts: list[str]) -> Condition:
        return {STATES: self.pipeline.encode_prompt(prompts, self.device, 1, False)[0]}


class UNetBackbone(Backbone):
    """Stable Diffusion (arXiv 2112.10752).

    A student turns every linear layer of the down, mid and up blocks, as in the paper: 83.80 M parameters of
    Stable Diffusion 1.5 and 94.43 M of 2.1 at rank 256, where the projections around attention are
    convolutions in 1.5. The fake model's smaller selection has 9.38 M and 9.51 M at rank 32.
    """

    pipeline_class, network_name = StableDiffusionPipeline, "unet"
    network_class, text_class = UNet2DConditionModel, ClipPrompts
    # residual blocks too: their normalization and activation are what eager execution is slow at
    blocks = (*UNet2DConditionModel._repeated_blocks, "ResnetBlock2D")
    student_rank = 256
    student_pattern = r"(down_blocks|mid_block|up_blocks)\..*"
    fake_pattern = rf"(down_blocks|mid_block|up_blocks)\..*\.({ATTENTION_AND_FEED_FORWARD})"

    addition: ClassVar[str | None] = None
    """What the U-Net is told beside the states of the text: its `addition_embed_type`."""

    @classmethod
    def drives(cls, network: nn.Module) -> bool:
        """See `Backbone.drives`: a U-Net that is told this, and nothing else."""
        return super().drives(network) and network.config.addition_embed_type == cls.addition

    def added(self, condition: Condition) -> Condition | None:
        """What the U-Net is told beside the states of the text, for N prompts."""
        return None

    def predict(
        self,
        network: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        guidance: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backbone.predict`."""
        return network(
            x_t.to(self.dtype),
            t,
            encoder_hidden_states=condition[STATES].to(self.dtype),
            added_cond_kwargs=self.added(condition),
            return_dict=False,
        )[0].float()
