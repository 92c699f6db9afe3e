"""Tiny LoRAs of pipelines, written with the names of diffusers or of kohya's scripts."""

import torch
from safetensors.torch import save_file

LAYERS = {
    "unet": ("attn1.to_q", "attn1.to_out.0", "attn2.to_v", "ff.net.0.proj"),
    "transformer": ("attn.to_q", "attn.to_out.0", "attn.add_v_proj", "ff.net.0.proj"),
    "text_encoder": ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"),
    "text_encoder_2": ("self_attn.k_proj", "self_attn.out_proj", "mlp.fc2"),
}
"""Ends of the names of the layers that a LoRA changes, by the part of the pipeline."""
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def random_lora(pipeline, parts, rank=2, seed=1):
    """Part -> layer, without `text_model.` -> two matrices, down (rank, in) and up (out, rank)."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for part in parts:
        for name, parameter in getattr(pipeline, part).named_parameters():
            layer = name.removesuffix(".weight").removeprefix("text_model.")
            if name.endswith(".weight") and layer.endswith(LAYERS[part]):
                down = torch.randn(rank, parameter.shape[1], generator=generator)
                up = torch.randn(parameter.shape[0], rank, generator=generator) * 0.1
                found.setdefault(part, {})[layer] = (down, up)
    return found


def save_diffusers(lora, file):
    """Write a LoRA whose alpha is its rank, as diffusers' training scripts do."""
    tensors = {}
    for part, layers in lora.items():
        for layer, (down, up) in layers.items():
            name = f"{part}.text_model.{layer}" if part.startswith("text") else f"{part}.{layer}"
            tensors[f"{name}.lora_A.weight"] = down
            tensors[f"{name}.lora_B.weight"] = up
    save_file(tensors, file)
    return file


def save_kohya(lora, file, alpha):
    """Write a LoRA with an alpha, as kohya's scripts do. SDXL's first text encoder is called te1."""
    tensors, sdxl = {}, "text_encoder_2" in lora
    for part, layers in lora.items():
        prefix = "lora_te1" if sdxl and part == "text_encoder" else KOHYA[part]
        for layer, (down, up) in layers.items():
            inner = layer if part == "unet" else f"text_model.{layer}"
            name = f"{prefix}_{inner.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, file)
    return file


def fused(pipeline, lora, scale):
    """Part -> name of each weight -> the weight plus scale times up times down, computed here."""
    result = {}
    for part, layers in lora.items():
        state = dict(getattr(pipeline, part).state_dict())
        for layer, (down, up) in layers.items():
            name = next(n for n in state if n.removeprefix("text_model.") == f"{layer}.weight")
            state[name] = state[name] + scale * up @ down
        result[part] = state
    return result
