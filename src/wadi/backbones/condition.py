"""The inputs of a network for a prompt: tensors by the name that most networks have for them.

| network | tensors |
| --- | --- |
| `UNet2DConditionModel` | `encoder_hidden_states` (N, L, D); of SDXL also `text_embeds` (N, P), pooled |
| of Stable Diffusion 3, FLUX.1 | `encoder_hidden_states`, and `pooled_projections` (N, P) |
| of FLUX.2-klein | `encoder_hidden_states` |
| of PixArt, Sana, Z-Image, Qwen-Image | `encoder_hidden_states`, and `encoder_attention_mask` (N, L) |

The mask is true at tokens. Only `PER_TOKEN` tensors have an entry for each token. All others, and the mask,
have the same length for every prompt: pooled embeddings (N, D) are never cut or padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Condition = dict[str, torch.Tensor]
"""Tensors with the same first dimension: N prompts."""

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
PER_TOKEN = frozenset({STATES})
"""Tensors (N, L, D) with the second dimension of the mask (N, L), if there is one. They may be cut after the
longest prompt and are padded with zeros, which the mask hides."""


def used_tokens(mask: torch.Tensor) -> int:
    """Number of tokens of the longest prompt, from a mask (N, L)."""
    used = mask.bool().any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def without_padding(condition: Condition) -> Condition:
    """The condition with tensors `PER_TOKEN` cut after its longest prompt, if it has a mask."""
    if MASK not in condition:
        return condition
    length = used_tokens(condition[MASK])
    return {name: tensor[:, :length] if name in PER_TOKEN else tensor for name, tensor in condition.items()}


def whole_shape(condition: Condition, name: str) -> tuple[int, ...]:
    """Shape of a tensor for one prompt (without the first dimension), before `without_padding`."""
    shape = tuple(condition[name].shape[1:])
    return (condition[MASK].shape[1], *shape[1:]) if name in PER_TOKEN and MASK in condition else shape


def pick(condition: Condition, index: Any) -> Condition:
    """Index the first dimension of every tensor."""
    return {name: tensor[index] for name, tensor in condition.items()}


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Join the prompts of several conditions in order."""
    return {name: torch.cat([c[name] for c in conditions]) for name in conditions[0]}


def repeat(condition: Condition, count: int) -> Condition:
    """Repeat one prompt (1, ...) `count` times, without a copy."""
    return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in condition.items()}


def choose(flag: torch.Tensor, yes: Condition, no: Condition) -> Condition:
    """`yes` if the 0-dimensional `flag` is true, else `no`, chosen on the device. `yes` may be one prompt."""
    return {name: torch.where(flag, yes[name], no[name]) for name in no}
