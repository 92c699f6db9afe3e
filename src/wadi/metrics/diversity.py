"""Diversity: how much images vary in what their prompts leave free."""

from __future__ import annotations

import torch


def entropy_bits(classes: torch.Tensor, num_classes: int) -> float:
    """The entropy of `classes` in bits: 0 if all are the same, log2(num_classes) if all are equally frequent.

    Args:
        classes: (N,) int64 in [0, num_classes).
        num_classes: number of possible classes.
    """
    share = torch.bincount(classes.flatten().cpu(), minlength=num_classes).double() / classes.numel()
    return -(share * share.clamp(min=1e-300).log2()).sum().item()


def spread(features: torch.Tensor) -> float:
    """The diversity of images of one prompt: the mean over prompts and pairs of 1 - cos of their features.

    Args:
        features: (P, n, D), features of n >= 2 images of each of P prompts.

    Returns:
        0 if all images of each prompt are the same.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    n = unit.shape[1]
    # |sum_i u_i|^2 = n + 2 sum_{i<j} u_i.u_j
    cosines = (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / (n * (n - 1))
    return (1 - cosines).mean().item()
