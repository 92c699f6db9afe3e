"""Every family that the nodes for ComfyUI know: a tiny network, its original layout, and the way back."""

import re

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from peft import inject_adapter_in_model
from torch import nn

from tests.directions.cases import ldm_key
from tests.teachers import original
from tests.tiny import tiny_pixart, tiny_sd3, tiny_sdxl
from tests.tiny_flows import tiny_flux
from wadi.emoji import teacher_folder
from wadi.lorad import LoRaDConfig, LoRaDLayer

PREFIX = "model.diffusion_model."


def sd15():
    """The U-Net of Stable Diffusion 1.5, small: convolutions around its attention, one head size a level."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=14,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def emoji():
    return UNet2DConditionModel.from_pretrained(teacher_folder(), subfolder="unet")


def sd35():
    return tiny_sd3(qk_norm="rms_norm", dual_attention_layers=(0,)).transformer


NETWORKS = {
    "emoji": emoji,
    "sd15": sd15,
    "sdxl": lambda: tiny_sdxl().unet,
    "sd3": lambda: tiny_sd3().transformer,
    "sd35": sd35,
    "flux-dev": lambda: tiny_flux().transformer,
    "flux-schnell": lambda: tiny_flux(dev=False).transformer,
    "pixart": lambda: tiny_pixart().transformer,
}


def layout(network: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a network in its original layout, without a prefix."""
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        return {key.removeprefix(PREFIX): value for key, value in original.unet(network).items()}
    if kind == "SD3Transformer2DModel":
        return {key.removeprefix(PREFIX): value for key, value in original.sd3_transformer(network).items()}
    return {"FluxTransformer2DModel": flux, "PixArtTransformer2DModel": pixart}[kind](network)


def back(network: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """What diffusers' conversion of single files makes of these; None where it has none for tiny networks."""
    prefixed = {PREFIX + key: value for key, value in tensors.items()}
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        return convert_ldm_unet_checkpoint(prefixed, network.config)
    if kind == "SD3Transformer2DModel":
        return convert_sd3_transformer_checkpoint_to_diffusers(prefixed)
    return None


def turned_network(network: nn.Module, r: int = 3) -> tuple[nn.Module, list[str]]:
    """Put random angles of up to about a radian on every layer that has a weight of two axes or more."""
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    inject_adapter_in_model(LoRaDConfig(r=r, target_modules=layers), network)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, LoRaDLayer):
            for factor in (module.lorad_A["default"], module.lorad_B["default"]):
                factor.data = torch.randn(factor.shape, generator=generator) * r**-0.25 / 2
    return network, layers


def merged(network: nn.Module) -> dict[str, torch.Tensor]:
    """Merge the adapters, and return the tensors of the plain network."""
    for module in network.modules():
        if isinstance(module, LoRaDLayer):
            module.merge()
    for name, module in list(network.named_modules()):
        if isinstance(module, LoRaDLayer):
            network.set_submodule(name, module.get_base_layer())
    return dict(network.state_dict())


def flux(network):
    """By the rule of diffusers' conversion, read backwards."""
    state = network.state_dict()
    sides = {"linear_1": "in_layer", "linear_2": "out_layer"}
    embedders = {"timestep": "time_in", "text": "vector_in", "guidance": "guidance_in"}
    names = {
        "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
        "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm", "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj", "norm.linear": "modulation.lin", "proj_out": "linear2",
    }  # fmt: skip
    result = {}
    for key, value in state.items():
        layer, _, end = key.rpartition(".")
        if match := re.match(r"time_text_embed\.(\w+)_embedder\.(\w+)$", layer):
            result[f"{embedders[match[1]]}.{sides[match[2]]}.{end}"] = value
        elif layer in ("x_embedder", "context_embedder"):
            result[f"{'img' if layer[0] == 'x' else 'txt'}_in.{end}"] = value
        elif layer == "proj_out":
            result[f"final_layer.linear.{end}"] = value
        elif layer == "norm_out.linear":
            result[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat(value.chunk(2)[::-1])
        else:
            blocks, number, inner = re.match(r"(\w+)\.(\d+)\.(.+)", layer).groups()
            single = blocks.startswith("single")
            at = f"{'single' if single else 'double'}_blocks.{number}"
            whole = f"{blocks}.{number}"
            if single and inner == "attn.to_q":
                parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
                result[f"{at}.linear1.{end}"] = torch.cat([state[f"{whole}.{part}.{end}"] for part in parts])
            elif inner in ("attn.to_q", "attn.add_q_proj"):
                parts = [inner, inner.replace("q", "k", 1), inner.replace("q", "v", 1)]
                side = "img" if inner == "attn.to_q" else "txt"
                tensors = [state[f"{whole}.{part}.{end}"] for part in parts]
                result[f"{at}.{side}_attn.qkv.{end}"] = torch.cat(tensors)
            elif single and "norm_" in inner:
                result[f"{at}.norm.{'query' if inner[-1] == 'q' else 'key'}_norm.scale"] = value
            elif inner in names:
                result[f"{at}.{names[inner]}.{'scale' if 'norm_' in inner else end}"] = value
    return result


def pixart(network):
    """By the rule of PixArt's own script for diffusers, read backwards."""
    state = network.state_dict()
    names = {
        "pos_embed.proj": "x_embedder.proj", "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2", "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear", "": "final_layer",
    }  # fmt: skip
    embedders = {"timestep": "t", "resolution": "csize", "aspect_ratio": "ar"}
    inner = {
        "": "", "attn1.to_out.0": ".attn.proj", "attn2.to_q": ".cross_attn.q_linear",
        "attn2.to_out.0": ".cross_attn.proj", "ff.net.0.proj": ".mlp.fc1", "ff.net.2": ".mlp.fc2",
    }  # fmt: skip
    result = {}
    for key, value in state.items():
        layer, _, end = key.rpartition(".")
        if match := re.match(r"transformer_blocks\.(\d+)\.?(.*)", layer):
            block, part = match.groups()
            for first, name, count in (
                ("attn1.to_q", "attn.qkv", 3),
                ("attn2.to_k", "cross_attn.kv_linear", 2),
            ):
                if part == first:
                    parts = ["to_q", "to_k", "to_v"][-count:]
                    tensors = [state[f"{layer[:-4]}{each}.{end}"] for each in parts]
                    result[f"blocks.{block}.{name}.{end}"] = torch.cat(tensors)
            if part in inner:
                result[f"blocks.{block}{inner[part]}.{end}"] = value
        elif match := re.match(r"adaln_single\.emb\.(\w+)_embedder\.linear_(\d)", layer):
            result[f"{embedders[match[1]]}_embedder.mlp.{2 * int(match[2]) - 2}.{end}"] = value
        else:
            result[f"{names[layer]}.{end}"] = value
    return result


def ldm_names(network: UNet2DConditionModel) -> dict[str, str]:
    """The original key of every tensor of a U-Net of any depth, by the key of diffusers."""
    added = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    result = {}
    for key in network.state_dict():
        layer, _, parameter = key.rpartition(".")
        depth = network.config.layers_per_block
        result[key] = f"{added[layer]}.{parameter}" if layer in added else ldm_key(key, depth, network)
    return result
