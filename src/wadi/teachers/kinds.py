"""Tell what a single file holds, from the names and shapes in its header, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from wadi.errors import WadiError
from wadi.onestep.components import Entry, read_headers
from wadi.torch_files import UNSAFE, unsafe_message

LORA = re.compile(r"\blora_(up|down|A|B)\b|\.lora\.(up|down)\.|lora_linear_layer\.|_lora\.(up|down)\.")
"""In the name of every matrix of a LoRA, as diffusers, PEFT and kohya call them."""

OTHER_ADAPTERS = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoHa": re.compile(r"\bhada_"),
    "LoKr": re.compile(r"\blokr_"),
    "OFT": re.compile(r"\boft_"),
    "LoRA with Tucker decomposition": re.compile(r"\blora_mid\b"),
    "adapter with whole differences": re.compile(r"\.diff(_b)?$"),
}
"""Adapters of other kinds than LoRA, which diffusers converts only in part or not at all."""

_LORAD = re.compile(r"\.(lorad_[AB]|theta_[ab])\b")
_QUANTISED = re.compile(r"quant_state|\.absmax$|scale_weight$|weight_scale|scaled_fp8|comfy_quant|\.qweight$")
_CONTROL = re.compile(r"^(control_model|controlnet_|control_)|input_hint_block|controlnet_cond_embedding")
_IMAGE_PROMPT = re.compile(r"^(image_proj|ip_adapter)\.")
_MOTION = re.compile(r"motion_modules?\.")
_WORD = re.compile(r"^(emb_params|string_to_param.*|clip_[lg]|t5xxl|<.*>)$")
_VAE = re.compile(r"^(encoder\.|decoder\.|quant_conv\.|post_quant_conv\.|first_stage_model\.|vae\.)")
_TEXT = re.compile(
    r"^(text_model|text_projection|text_encoders?|cond_stage_model|conditioner|shared|encoder\.block"
    r"|encoder\.final_layer_norm|encoder\.embed_tokens|transformer\.resblocks|token_embedding|lm_head)(\.|$)"
)
_FIRST_LAYER = re.compile(r"^(model\.diffusion_model\.|unet\.)?(input_blocks\.0\.0|conv_in)\.weight$")


def read_model_header(file: Path) -> dict[str, Entry]:
    """List the tensors of a file that should hold a model.

    Raises:
        WadiError: the file cannot be read, is not safetensors, or holds something else than a model that wadi
            can distil; the message says what it is.
    """
    entries = _header(file)
    if said := _not_a_model(entries):
        raise WadiError(f"{file}: {said}")
    return entries


def read_lora_header(file: Path) -> dict[str, Entry]:
    """List the tensors of a file that should hold a LoRA.

    Raises:
        WadiError: the file cannot be read, is not safetensors, or holds something else than a LoRA; the
            message says what it is.
    """
    entries = _header(file)
    if _any(_LORAD, entries):
        raise WadiError(f"{file}: is a LoRaD adapter of wadi; name its folder with --student-adapter")
    for name, pattern in OTHER_ADAPTERS.items():
        if found := [key for key in entries if pattern.search(key)]:
            raise WadiError(
                f"{file}: is a {name} ({len(found)} of {len(entries)} tensors, such as {found[0]}), and only "
                "LoRA can be fused; merge it into the model with the program that made it"
            )
    if not _any(LORA, entries):
        what = _not_a_model(entries) or "holds a whole model; name it with --teacher"
        raise WadiError(f"{file}: is not a LoRA: it {what}")
    return entries


def _header(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        raise WadiError(f"{file}: there is no such file; name a .safetensors file")
    if file.suffix == ".gguf":
        raise WadiError(
            f"{file}: holds quantised weights (GGUF), which cannot be trained on; name the original"
        )
    if file.suffix.lower() in UNSAFE:
        raise WadiError(unsafe_message(file))
    if file.suffix != ".safetensors":  # diffusers chooses the reader by the suffix
        raise WadiError(f"{file}: must be a .safetensors file; name another file")
    return read_headers([file])


def _not_a_model(entries: Mapping[str, Entry]) -> str | None:
    """What a file is and what to do, if it holds no model that can be a teacher; otherwise ``None``."""
    if _any(_LORAD, entries):
        return "holds a LoRaD adapter of wadi; name its folder with --student-adapter or --adapter"
    if any(_any(pattern, entries) for pattern in (LORA, *OTHER_ADAPTERS.values())):
        return "holds an adapter such as LoRA; name it with --teacher-lora, and its base model with --teacher"
    if _any(_QUANTISED, entries):
        return "holds quantised weights, which need the program that made them; name the original model"
    if _any(_CONTROL, entries):
        return "holds a ControlNet; name a text-to-image model"
    if _any(_IMAGE_PROMPT, entries):
        return "holds an IP-Adapter; name a text-to-image model"
    if all(_MOTION.search(key) for key in entries):
        return "holds a motion module for videos; name a text-to-image model"
    if all(_WORD.search(key) for key in entries):
        return "holds a learned word; name it with wadi generate --embedding, and a model here"
    if all(_TEXT.search(key) for key in entries):
        return "holds only text encoders; name a file that holds the whole model"
    if all(_VAE.search(key) for key in entries):
        return "holds only an autoencoder; name a file that holds the whole model"
    first = next((entry for key, entry in entries.items() if _FIRST_LAYER.search(key)), None)
    if first is not None and len(first.shape) == 4 and first.shape[1] in (8, 9):
        return (
            f"holds a network that takes {first.shape[1]} channels, as models for inpainting or editing do; "
            "name a text-to-image model"
        )
    return None


def _any(pattern: re.Pattern[str], entries: Mapping[str, Entry]) -> bool:
    return any(pattern.search(key) for key in entries)
