"""The networks of published models: class in diffusers, and what differs from the class's defaults.

Benchmarks build them with random weights, and "tiny" for smoke tests. tests/backbones/test_layers.py counts
their parameters.
"""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

_SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
_SD35_MEDIUM = {**_SD3, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
_SD35_LARGE = {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
_PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "patch_size": 2,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
}
_KLEIN = {"guidance_embeds": False}

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
        },
    ),
    "sd15": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
    "sd21": (
        "UNet2DConditionModel",
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "pixart-256": ("PixArtTransformer2DModel", {**_PIXART, "sample_size": 32}),
    "pixart-1024": ("PixArtTransformer2DModel", {**_PIXART, "sample_size": 128}),
    "sd3-medium": ("SD3Transformer2DModel", _SD3),
    "sd35-medium": ("SD3Transformer2DModel", {**_SD35_MEDIUM, "qk_norm": "rms_norm"}),
    "sd35-large": ("SD3Transformer2DModel", {**_SD35_LARGE, "qk_norm": "rms_norm"}),
    "flux-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux-schnell": ("FluxTransformer2DModel", {"guidance_embeds": False}),
    "sana-1.6b": ("SanaTransformer2DModel", {}),
    "sana-0.6b": (
        "SanaTransformer2DModel",
        {
            "num_layers": 28,
            "num_attention_heads": 36,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
        },
    ),
    "klein-4b": (
        "Flux2Transformer2DModel",
        {
            **_KLEIN,
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
    ),
    "klein-9b": (
        "Flux2Transformer2DModel",
        {
            **_KLEIN,
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
        },
    ),
    "z-image": ("ZImageTransformer2DModel", {"axes_lens": [1536, 512, 512]}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
}


def make_network(name: str) -> nn.Module:
    """The network of a published model, with its initial weights on torch's default device."""
    kind, config = NETWORKS[name]
    return getattr(diffusers, kind)(**config)
