"""The text encoders in single files: OpenAI's CLIP and T5 keep their names, OpenCLIP's has others."""

from __future__ import annotations

import re

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from torch import nn

Tensors = dict[str, torch.Tensor]

_OPEN_CLIP = DIFFUSERS_TO_LDM_MAPPING["openclip"]
_MODEL = "text_model."


def clip_tensors(encoder: nn.Module, prefix: str) -> Tensors:
    """The tensors of a CLIP of transformers, with the prefix that transformers 5 dropped from some."""
    return {prefix + _old(name): tensor for name, tensor in encoder.state_dict().items()}


def t5_tensors(encoder: nn.Module, prefix: str) -> Tensors:
    """The tensors of a `T5EncoderModel`. Its table of tokens has two names, of which diffusers reads both."""
    state = encoder.state_dict()
    return {prefix + name: _apart(name, tensor) for name, tensor in state.items()}


def open_clip_tensors(encoder: nn.Module, prefix: str) -> Tensors:
    """The tensors of a CLIP by OpenCLIP's names: queries, keys and values joined, the projection turned."""
    state = {_old(name): tensor for name, tensor in encoder.state_dict().items()}
    tensors: Tensors = {}
    for name, tensor in state.items():
        if (original := _OPEN_CLIP["layers"].get(name)) is not None:
            tensors[prefix + original] = tensor.T if original == "text_projection" else tensor
            continue
        if re.search(r"\.[kv]_proj\.", name):
            continue  # with the queries
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace(".q_proj.", f".{which}_proj.")] for which in "qkv"])
            name = name.replace(".q_proj.", ".in_proj_")
        for new, old in _OPEN_CLIP["transformer"].items():
            name = name.replace(new, old)
        tensors[f"{prefix}transformer.{name}"] = tensor
    return tensors


def _apart(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if name == "encoder.embed_tokens.weight" else tensor


def _old(name: str) -> str:
    return name if name.startswith((_MODEL, "text_projection.")) else _MODEL + name
