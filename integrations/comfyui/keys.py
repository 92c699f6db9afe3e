"""Where the layers of an adapter are in the original layout of a model, which ComfyUI has in memory.

An adapter names its layers as diffusers does. The original layouts have other names, and put several layers
into one weight: those are rows of it here. Where the original has the two halves of a layer's rows in the
other order (shift and scale), the layer is `swapped`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .adapter import Factors

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Target:
    """Where the weight of a layer is.

    Attributes:
        key: of the weight in the original layout.
        start, rows: which rows of it belong to the layer; `start` is ``None`` if all do.
        swapped: the layer's halves are there in the other order.
    """

    key: str
    start: int | None
    rows: int
    swapped: bool = False


class _Place(NamedTuple):
    """A layer's place in its block.

    Several layers in one weight have as many rows each as the weight has inputs; the last one may have more.
    """

    name: str
    first: int | None = None  # how many such layers are before it; None: the weight is its own
    last: bool = False  # it has all rows that are left
    swapped: bool = False


def _joined(name: str, layers: Sequence[str], first: int = 0) -> dict[str, _Place]:
    """Layers whose weights are one below the other in the weight `name`."""
    return {layer: _Place(name, first + i) for i, layer in enumerate(layers)}


def _own(names: Mapping[str, str]) -> dict[str, _Place]:
    return {layer: _Place(name) for layer, name in names.items()}


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _inside(attention: str, layers: Sequence[str]) -> list[str]:
    return [f"{attention}.{layer}" for layer in layers]


_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SD3 = _own(
    {
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
    }
) | {"norm_out.linear": _Place("final_layer.adaLN_modulation.1", swapped=True)}
_SD3_BLOCK = (
    _own(
        {
            "norm1.linear": "x_block.adaLN_modulation.1",
            "norm1_context.linear": "context_block.adaLN_modulation.1",
            "attn.to_out.0": "x_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj",
            "attn.to_add_out": "context_block.attn.proj",
            "ff.net.0.proj": "x_block.mlp.fc1",
            "ff.net.2": "x_block.mlp.fc2",
            "ff_context.net.0.proj": "context_block.mlp.fc1",
            "ff_context.net.2": "context_block.mlp.fc2",
        }
    )
    | _joined("x_block.attn.qkv", _inside("attn", _QKV))
    | _joined("x_block.attn2.qkv", _inside("attn2", _QKV))
    | _joined("context_block.attn.qkv", _inside("attn", _ADDED))
)
_FLUX = _own(
    {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        **{
            f"time_text_embed.{embedder}.linear_{i}": f"{name}.{side}_layer"
            for embedder, name in (
                ("timestep_embedder", "time_in"),
                ("text_embedder", "vector_in"),
                ("guidance_embedder", "guidance_in"),
            )
            for i, side in ((1, "in"), (2, "out"))
        },
        "proj_out": "final_layer.linear",
    }
) | {"norm_out.linear": _Place("final_layer.adaLN_modulation.1", swapped=True)}
_FLUX_BLOCK = (
    _own(
        {
            "norm1.linear": "img_mod.lin",
            "norm1_context.linear": "txt_mod.lin",
            "attn.to_out.0": "img_attn.proj",
            "attn.to_add_out": "txt_attn.proj",
            "ff.net.0.proj": "img_mlp.0",
            "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0",
            "ff_context.net.2": "txt_mlp.2",
        }
    )
    | _joined("img_attn.qkv", _inside("attn", _QKV))
    | _joined("txt_attn.qkv", _inside("attn", _ADDED))
)
_FLUX_SINGLE = (
    _own({"norm.linear": "modulation.lin", "proj_out": "linear2"})
    | _joined("linear1", _inside("attn", _QKV))
    | {"proj_mlp": _Place("linear1", 3, last=True)}
)
_PIXART_EMBEDDERS = {
    "timestep_embedder": "t_embedder",
    "resolution_embedder": "csize_embedder",
    "aspect_ratio_embedder": "ar_embedder",
}
_PIXART = _own(
    {
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "adaln_single.linear": "t_block.1",
        **{
            f"adaln_single.emb.{embedder}.linear_{i}": f"{name}.mlp.{2 * i - 2}"
            for embedder, name in _PIXART_EMBEDDERS.items()
            for i in (1, 2)
        },
        "proj_out": "final_layer.linear",
    }
)
_PIXART_BLOCK = (
    _own(
        {
            "attn1.to_out.0": "attn.proj",
            "attn2.to_q": "cross_attn.q_linear",
            "attn2.to_out.0": "cross_attn.proj",
            "ff.net.0.proj": "mlp.fc1",
            "ff.net.2": "mlp.fc2",
        }
    )
    | _joined("attn.qkv", _inside("attn1", _QKV))
    | _joined("cross_attn.kv_linear", _inside("attn2", _QKV[1:]))
)
# of each family: a weight that tells it, the layers outside of blocks, and each list of blocks
_TRANSFORMERS = (
    ("joint_blocks.0.x_block.attn.qkv", _SD3, {"transformer_blocks": ("joint_blocks", _SD3_BLOCK)}),
    (
        "double_blocks.0.img_attn.qkv",
        _FLUX,
        {
            "transformer_blocks": ("double_blocks", _FLUX_BLOCK),
            "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
        },
    ),
    ("blocks.0.cross_attn.kv_linear", _PIXART, {"transformer_blocks": ("blocks", _PIXART_BLOCK)}),
)


def locate(layer: str, shapes: Shapes) -> Target | None:
    """Find a layer in a model.

    Args:
        layer: its name in diffusers, without ``.weight``.
        shapes: of the model's tensors in the original layout, by their keys without any prefix.

    Returns:
        Where it is; ``None`` if the model has no such layer, or is of another family.
    """
    place = _unet_place(layer, shapes) if "input_blocks.0.0.weight" in shapes else _place(layer, shapes)
    if place is None or f"{place.name}.weight" not in shapes:
        return None
    key = f"{place.name}.weight"
    if len(shapes[key]) < 2:
        return None
    rows, inputs = shapes[key][:2]
    if place.first is None:
        return Target(key, None, rows, place.swapped)
    start = place.first * inputs
    return Target(key, start, rows - start if place.last else inputs)


def _place(layer: str, shapes: Shapes) -> _Place | None:
    """A layer of a transformer, with its whole name there."""
    for sign, outside, lists in _TRANSFORMERS:
        if f"{sign}.weight" not in shapes:
            continue
        match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", layer)
        if match is None or match[1] not in lists:
            return outside.get(layer)
        blocks, inner = lists[match[1]]
        place = inner.get(match[3])
        return place and place._replace(
            name=f"{blocks}.{match[2]}.{place.name}", swapped=_is_last_context(layer, blocks, shapes)
        )
    return None


def _is_last_context(layer: str, blocks: str, shapes: Shapes) -> bool:
    """Whether a layer is the norm of the text in the last block of SD 3, which diffusers swaps."""
    if blocks != "joint_blocks" or not layer.endswith(".norm1_context.linear"):
        return False
    # the last block has no more use for the text, and so no projection of it
    number = layer.split(".")[1]
    return f"joint_blocks.{number}.context_block.attn.proj.weight" not in shapes


def _unet_place(layer: str, shapes: Shapes) -> _Place | None:
    if layer in _UNET:
        return _Place(_UNET[layer])
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", layer)
    if match is None:
        return None
    side, block, kind, number = match[1], int(match[2] or 0), match[3], int(match[4])
    inner = _RESNET.get(match[5]) if kind == "resnets" else match[5]
    if inner is None:
        return None
    if side == "mid":
        return _Place(f"middle_block.{2 * number if kind == 'resnets' else 1}.{inner}")
    # a block of diffusers is so many entries of the list here, downsampler and upsampler included
    count = next((i for i in range(1, 100) if f"input_blocks.{i}.0.op.weight" in shapes), 100)
    if kind == "downsamplers":
        return _Place(f"input_blocks.{count * (block + 1)}.0.op")
    if kind == "upsamplers":
        entry = f"output_blocks.{count * (block + 1) - 1}"
        position = next((i for i in (1, 2) if f"{entry}.{i}.conv.weight" in shapes), 1)
        return _Place(f"{entry}.{position}.conv")
    entry = f"input_blocks.{1 + count * block + number}" if side == "down" else None
    entry = entry or f"output_blocks.{count * block + number}"
    return _Place(f"{entry}.{0 if kind == 'resnets' else 1}.{inner}")


def fitted(layers: Mapping[str, Factors], shapes: Shapes, name: str) -> list[tuple[Target, Factors]]:
    """Find all layers of an adapter in a model, with their factors as the model's rows need them.

    Args:
        layers: from `adapter.read_angles`.
        shapes: see `locate`.
        name: of the adapter, for messages.

    Raises:
        ValueError: the model has no such layer, or one of another size; then the adapter is not for it.
    """
    found = {layer: locate(layer, shapes) for layer in layers}
    missing = [layer for layer, target in found.items() if target is None]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of its {len(layers)} layers are not in this model, such as {missing[0]}"
            "; load the checkpoint that the adapter was distilled from"
        )
    result = []
    for layer, (A, B) in layers.items():
        target = found[layer]
        inputs = math.prod(shapes[target.key][1:])
        if (A.shape[0], B.shape[1]) != (target.rows, inputs // 2):
            raise ValueError(
                f"{name}: {layer} turns a weight of {A.shape[0]} x {2 * B.shape[1]}, and this model has "
                f"{target.rows} x {inputs} there; load the checkpoint that the adapter was distilled from"
            )
        if target.swapped:
            A = torch.cat(A.chunk(2)[::-1])
        result.append((target, (A, B)))
    return result
