"""Tiny pipelines of the rectified flows after Stable Diffusion 3, of real classes with random weights."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from tests.tiny import tiny_clip, tiny_flow_vae, tiny_t5, tiny_tokenizer

FLUX_SHIFT = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""What FLUX.1 dev's scheduler has."""


def tiny_flux(dev: bool = True, seed: int = 0) -> FluxPipeline:
    """Build a `FluxPipeline` of 2 pixels a latent with the published scheduler.

    Args:
        dev: whether the network takes the guidance as an input; without it, the pipeline is schnell's.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, t5 = tiny_tokenizer(32), tiny_t5(32)
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(4, 4, 8),
        )
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**(FLUX_SHIFT if dev else {"shift": 1.0})),
            vae=tiny_flow_vae(0.3611, 0.1159),
            text_encoder=tiny_clip(CLIPTextModel, tokenizer, 16),
            tokenizer=tokenizer,
            text_encoder_2=t5["encoder"],
            tokenizer_2=t5["tokenizer"],
            transformer=transformer.eval(),
        )
