"""What layers are called in the adapters that ComfyUI, A1111, Forge, InvokeAI and diffusers load."""

from __future__ import annotations

import re

from diffusers import DiffusionPipeline

_ORIGINAL = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}
"""Layers of SDXL that diffusers finds only by their original names."""
_TEXT = {"text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def adapter_name(pipeline: DiffusionPipeline, part: str, layer: str) -> str:
    """The name of a layer before the first dot of a tensor's own name, such as ``.lora_up.weight``.

    Layers of U-Nets and text encoders are called as kohya's scripts call them, with underscores. Those of
    transformers are called ``transformer.`` and their name in diffusers, which ComfyUI knows too.

    Args:
        pipeline: that has the layer.
        part: of the pipeline.
        layer: name of the layer in the part.
    """
    if part == "transformer":
        return f"transformer.{layer}"
    if part == "unet":
        name = layer.replace(".", "_")
        return f"lora_unet_{_ORIGINAL.get(name, name)}"
    prefix = _TEXT[part]
    if part == "text_encoder" and getattr(pipeline, "text_encoder_2", None) is not None:
        prefix = "lora_te1"
    layer = re.sub(r"^(text_model\.)?", "text_model.", layer)
    return f"{prefix}_{layer.replace('.', '_')}"
