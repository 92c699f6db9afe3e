"""How much varies of what a prompt leaves free."""

from __future__ import annotations

import torch


def entropy_bits(classes: torch.Tensor, num_classes: int) -> float:
    """Entropy of the distribution of `classes` in bits: 0 if all are the same, log2(num_classes) if uniform.

    Args:
        classes: (N,) int64 in [0, num_classes).
        num_classes: number of possible classes.
    """
    share = torch.bincount(classes.flatten().cpu(), minlength=num_classes).double() / classes.numel()
    return -(share * share.clamp(min=1e-300).log2()).sum().item()
