"""Tiny models as single files in the original layout, by the inverse of diffusers' names."""

import re

import torch
from safetensors.torch import save_file

from tests.directions.cases import ldm_key

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def save_original(pipeline, file, lacks=(), dtype=torch.float32, **more):
    """Write a pipeline as one file.

    Args:
        pipeline: Stable Diffusion, SDXL or Stable Diffusion 3.
        file: where to write.
        lacks: parts that the file does not hold.
        dtype: of all weights.
        **more: tensors to add.
    """
    layouts = {
        "StableDiffusionPipeline": sd,
        "StableDiffusionXLPipeline": sdxl,
        "StableDiffusion3Pipeline": sd3,
    }
    tensors = {}
    for part, converted in layouts[type(pipeline).__name__](pipeline).items():
        if part not in lacks:
            tensors |= converted
    save_file({key: value.to(dtype).contiguous() for key, value in tensors.items()} | more, file)
    return file


def sd(pipeline):
    return {
        "unet": unet(pipeline.unet),
        "vae": vae(pipeline.vae),
        "text_encoder": clip(pipeline.text_encoder, "cond_stage_model.transformer."),
    }


def sdxl(pipeline):
    return {
        "unet": unet(pipeline.unet),
        "vae": vae(pipeline.vae),
        "text_encoder": clip(pipeline.text_encoder, "conditioner.embedders.0.transformer."),
        "text_encoder_2": open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model."),
    }


def sd3(pipeline):
    # diffusers takes the identity for the projection of the first CLIP
    with torch.no_grad():
        weight = pipeline.text_encoder.text_projection.weight
        weight.copy_(torch.eye(len(weight)))
    return {
        "transformer": sd3_transformer(pipeline.transformer),
        "vae": vae(pipeline.vae),
        "text_encoder": clip(pipeline.text_encoder, "text_encoders.clip_l.transformer."),
        "text_encoder_2": clip(pipeline.text_encoder_2, "text_encoders.clip_g.transformer."),
        "text_encoder_3": t5(pipeline.text_encoder_3),
    }


def unet(network):
    added = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    result = {}
    for key, value in network.state_dict().items():
        layer, _, parameter = key.rpartition(".")
        name = f"{added[layer]}.{parameter}" if layer in added else ldm_key(key, 1, network)
        result[f"model.diffusion_model.{name}"] = value
    return result


def vae(network):
    blocks = len(network.config.block_out_channels)
    result = {}
    for key, value in network.state_dict().items():
        name = re.sub(r"mid_block\.attentions\.0\.(group_norm|to_q|to_k|to_v|to_out\.0)", _attention, key)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
        name = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name
        )
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        convolution = "mid.attn_1" in name and value.ndim == 2
        result[f"first_stage_model.{name}"] = value[:, :, None, None] if convolution else value
    return result


def _attention(match):
    return f"mid.attn_1.{_VAE_ATTENTION[match[1]]}"


def clip(network, prefix):
    result = {}
    for key, value in network.state_dict().items():
        if not key.startswith("text_projection"):
            result[f"{prefix}text_model.{key.removeprefix('text_model.')}"] = value
        elif "clip_g" in prefix:
            result[f"{prefix}{key}"] = value
    return result


def open_clip(network, prefix):
    state = {key.removeprefix("text_model."): value for key, value in network.state_dict().items()}
    result = {f"{prefix}text_projection": state.pop("text_projection.weight").T}
    for key in list(state):
        if match := re.match(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", key):
            parts = [state[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            result[f"{prefix}transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif key in _OPEN_CLIP:
            result[prefix + _OPEN_CLIP[key]] = state[key]
        elif not re.search(r"\.[kv]_proj\.", key):
            name = key.replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
            name = name.replace("layer_norm", "ln_").replace("mlp.fc1", "mlp.c_fc")
            result[prefix + name.replace("mlp.fc2", "mlp.c_proj")] = state[key]
    return result


def t5(network):
    state = network.state_dict()
    return {
        f"text_encoders.t5xxl.transformer.{key}": value.clone()
        for key, value in state.items()
        if key != "encoder.embed_tokens.weight"
    }


def sd3_transformer(network):
    state, last = dict(network.state_dict()), network.config.num_layers - 1
    names = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    inner = {
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
    }
    joined = {
        ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
        ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
    }
    result = {}
    for key in list(state):
        layer, _, parameter = key.rpartition(".")
        match = re.match(r"transformer_blocks\.(\d+)\.(.*)", layer)
        if match is None:
            result[names.get(key) or f"{names.get(layer, layer)}.{parameter}"] = state[key]
            continue
        block, part = match.groups()
        if part in inner:
            result[f"joint_blocks.{block}.{inner[part]}.{parameter}"] = state[key]
        for three, name in joined.items():
            if part == three[0]:
                tensors = [state[f"transformer_blocks.{block}.{each}.{parameter}"] for each in three]
                result[f"joint_blocks.{block}.{name}.{parameter}"] = torch.cat(tensors)
    swapped = ("final_layer", f"joint_blocks.{last}.context_block.adaLN")
    for key in result:
        if key.startswith(swapped) and "adaLN" in key:
            result[key] = torch.cat(result[key].chunk(2)[::-1])
    return {f"model.diffusion_model.{key}": value for key, value in result.items()}
