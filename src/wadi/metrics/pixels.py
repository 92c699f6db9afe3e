"""Figures of the pixels alone, for models whose images no judge can read."""

from __future__ import annotations

import torch

VIEWED_AT = 32
"""Pixels: images are compared at this side, where grain averages out and what they show does not."""


def pixel_spread(images: torch.Tensor) -> float:
    """How different the images of one prompt are: the mean over prompts and pairs of the RMS difference.

    Args:
        images: (P, n, 3, H, W) uint8, n at least 2 images of each of P prompts.

    Returns:
        0 if all images of every prompt are alike, 255 between black and white.
    """
    small = torch.nn.functional.adaptive_avg_pool2d(images.flatten(0, 1).float(), VIEWED_AT)
    vectors = small.unflatten(0, images.shape[:2]).flatten(2).double()
    distances = torch.stack([torch.pdist(prompt).mean() for prompt in vectors])
    return (distances.mean() / vectors.shape[-1] ** 0.5).item()


def pixel_detail(images: torch.Tensor) -> float:
    """Mean absolute difference between neighbouring pixels, of 255: low if blurred, high if grainy.

    Args:
        images: (N, 3, H, W) uint8.
    """
    values = images.double()
    differences = (values.diff(dim=-1).abs().mean(), values.diff(dim=-2).abs().mean())
    return (sum(differences) / 2).item()
