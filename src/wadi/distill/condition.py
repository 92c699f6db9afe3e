"""What a network is told of a prompt: tensors by the name of the network's argument.

| network | tensors |
| --- | --- |
| `UNet2DConditionModel` | `encoder_hidden_states` (N, L, D) |
| `PixArtTransformer2DModel` | the same, and `encoder_attention_mask` (N, L) bool, true at tokens |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Condition = dict[str, torch.Tensor]
"""Tensors of the same first dimension, N prompts."""


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
