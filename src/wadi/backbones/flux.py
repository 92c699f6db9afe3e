"""FLUX.1: a rectified flow in packed latents, conditioned on a T5 and on one pooled embedding of CLIP."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from wadi.backbones.base import Backbone
from wadi.backbones.condition import STATES, Condition
from wadi.backbones.sd3 import POOLED
from wadi.backbones.text import PromptEncoder
from wadi.onestep.loading import call_default

USUAL_GUIDANCE: float = call_default(FluxPipeline, "guidance_scale")
"""What the stock pipeline tells a network that takes the guidance as an input, unless it is asked for another
number: 3.5."""


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Tokens (N, HW / 4, 4C) of latents (N, C, H, W): 2 x 2 of them each, the channel slowest."""
    n, c, h, w = latents.shape
    squares = latents.reshape(n, c, h // 2, 2, w // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`, for latents of this height and width."""
    n, _, c = tokens.shape
    squares = tokens.reshape(n, height // 2, width // 2, c // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, height, width)


class FluxPrompts(PromptEncoder):
    """The states of T5, (N, 512, D), and the pooled embedding of CLIP, (N, P).

    The network has no mask, so the number of tokens is the pipeline's own. CLIP reads the first 77 alone, and
    T5, by which prompts are measured, all.
    """

    parts = ("text_encoder", "text_encoder_2")
    large = "text_encoder_2"
    dimensions: ClassVar[dict[str, int]] = {STATES: 3, POOLED: 2}

    def _encode(self, prompts: list[str]) -> Condition:
        states, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.length
        )
        return {STATES: states, POOLED: pooled}


class FluxBackbone(Backbone):
    """FLUX.1 (Black Forest Labs, 2024), dev and schnell.

    dev was distilled to take the guidance as an input. The teacher is told the guidance that is asked for;
    student and fake model are told 3.5, with which the stock pipeline will sample the student: an adapter on
    a shared base cannot remove the input, and public recipes that keep it have this number in all three
    models. schnell has no such input.

    A student turns every linear layer of the blocks, and the fake model's smaller selection has all but their
    modulation: 268.96 M and 194.2 M parameters at rank 64.
    """

    pipeline_class, network_name = FluxPipeline, "transformer"
    network_class, text_class = FluxTransformer2DModel, FluxPrompts
    blocks = tuple(FluxTransformer2DModel._repeated_blocks)
    student_rank = 64
    cudnn_attention = False
    student_pattern = r"(single_)?transformer_blocks\.\d+\..*"
    fake_pattern = r"(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context|proj_mlp|proj_out)(\..*)?"
    patch = 2

    @property
    def channels(self) -> int:
        """See `Backbone.channels`: of the network's tokens, each is four latents."""
        return self.network.config.in_channels // 4

    @property
    def takes_guidance(self) -> bool:
        """See `Backbone.takes_guidance`: true of dev."""
        return self.network.config.guidance_embeds

    def predict(
        self,
        network: nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        guidance: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backbone.predict`; t is 1000 sigma, and rounded to the compute dtype as the pipeline does."""
        (n, _, height, width), states = x_t.shape, condition[STATES].to(self.dtype)
        told = None
        if self.takes_guidance:
            scale = USUAL_GUIDANCE if guidance is None else guidance
            told = torch.ones(n, device=x_t.device) * (
                scale.flatten() if isinstance(scale, torch.Tensor) else scale
            )
        rows, columns = (torch.arange(side // 2, device=x_t.device) for side in (height, width))
        places = torch.cartesian_prod(rows.new_zeros(1), rows, columns)
        tokens = network(
            hidden_states=pack(x_t.to(self.dtype)),
            timestep=t.to(self.dtype) / 1000,
            guidance=told,
            pooled_projections=condition[POOLED].to(self.dtype),
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=places.to(self.dtype),
            return_dict=False,
        )[0]
        return unpack(tokens.float(), height, width)
