"""What a network is told of a prompt: tensors by the name that most networks have for them.

| network | tensors |
| --- | --- |
| `UNet2DConditionModel` | `encoder_hidden_states` (N, L, D); of SDXL also `text_embeds` (N, P), pooled |
| of Stable Diffusion 3, FLUX.1 | `encoder_hidden_states`, and `pooled_projections` (N, P) |
| of FLUX.2-klein | `encoder_hidden_states` |
| of PixArt, Sana, Z-Image, Qwen-Image | `encoder_hidden_states`, and `encoder_attention_mask` (N, L) |

The mask is true at tokens. Only `PER_TOKEN` tensors have a place for each token. All others, the mask too,
are of one length for every prompt: pooled embeddings (N, D) and time ids (N, 6) are never cut or filled up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Condition = dict[str, torch.Tensor]
"""Tensors of the same first dimension, N prompts."""

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
PER_TOKEN = frozenset({STATES})
"""Tensors (N, L, D) whose second dimension is that of the mask (N, L), if there is one: they may be cut
behind the longest prompt, and are filled up with zeros, where the mask lets nobody look."""


def used_tokens(mask: torch.Tensor) -> int:
    """Tokens of the longest prompt of a mask (N, L)."""
    used = mask.bool().any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


def without_padding(condition: Condition) -> Condition:
    """A condition whose tensors `PER_TOKEN` end with its longest prompt, if there is a mask to tell."""
    if MASK not in condition:
        return condition
    length = used_tokens(condition[MASK])
    return {name: tensor[:, :length] if name in PER_TOKEN else tensor for name, tensor in condition.items()}


def whole_shape(condition: Condition, name: str) -> tuple[int, ...]:
    """Shape of one prompt of a tensor, without the first dimension, as it was before `without_padding`."""
    shape = tuple(condition[name].shape[1:])
    return (condition[MASK].shape[1], *shape[1:]) if name in PER_TOKEN and MASK in condition else shape


def pick(condition: Condition, index: Any) -> Condition:
    """Index the first dimension of every tensor."""
    return {name: tensor[index] for name, tensor in condition.items()}


def concatenate(conditions: Sequence[Condition]) -> Condition:
    """Prompts of several conditions, one after the other."""
    return {name: torch.cat([c[name] for c in conditions]) for name in conditions[0]}


def repeat(condition: Condition, count: int) -> Condition:
    """One prompt (1, ...) as `count` equal ones, without a copy."""
    return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in condition.items()}


def choose(flag: torch.Tensor, yes: Condition, no: Condition) -> Condition:
    """`yes` where the 0-dimensional `flag` is true, else `no`; no host branch. `yes` may be one prompt."""
    return {name: torch.where(flag, yes[name], no[name]) for name in no}
