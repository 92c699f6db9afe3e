"""Two small networks and the files that hold them."""

import re

import torch
from safetensors.torch import save_file

from tests.tiny import tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


def perturbed(network, size=0.05, seed=3):
    """The network, every parameter moved by independent noise of `size` times its own deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter.std(correction=0) if parameter.numel() > 1 else 1.0
            parameter += size * scale * torch.randn(parameter.shape, generator=generator)
    return network


def fine_tuned_pipeline():
    """`tiny_pipeline()` with other weights of its U-Net."""
    pipeline = tiny_pipeline()
    perturbed(pipeline.unet)
    return pipeline


def save_whole_checkpoint(network, file, layers_per_block=1):
    """One file with LDM's keys, by the rule of diffusers' script convert_diffusers_to_original."""
    tensors = {
        "model.diffusion_model." + ldm_key(key, layers_per_block, network): value
        for key, value in network.state_dict().items()
    }
    tensors["first_stage_model.post_quant_conv.weight"] = torch.zeros(4, 4, 1, 1)
    save_file(tensors, file)


def ldm_key(key, layers, network):
    names = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    for ours, theirs in names.items():
        if key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", key):
        side, i, kind, j, rest = match.groups()
        first = 1 if side == "down" else 0
        at = f"{'input' if first else 'output'}_blocks.{(layers + 1) * int(i) + int(j) + first}"
        return f"{at}.{'0' if kind == 'resnets' else '1'}.{inside(kind, rest)}"
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", key):
        return f"input_blocks.{(layers + 1) * (int(match[1]) + 1)}.0.op.{match[2]}"
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", key):
        place = 2 if hasattr(network.up_blocks[int(match[1])], "attentions") else 1
        return f"output_blocks.{(layers + 1) * int(match[1]) + layers}.{place}.conv.{match[2]}"
    kind, j, rest = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key).groups()
    return f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}.{inside(kind, rest)}"


def inside(kind, rest):
    if kind == "attentions":
        return rest
    names = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    part, _, parameter = rest.partition(".")
    return f"{names[part]}.{parameter}"
