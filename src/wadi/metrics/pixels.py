"""Figures of the pixels alone, for models whose images no judge can read."""

from __future__ import annotations

import torch

VIEWED_AT = 32
"""Side in pixels at which images are compared: grain averages out there, but the objects stay visible."""


def pixel_spread(images: torch.Tensor) -> float:
    """The diversity of images of one prompt: the mean over prompts and pairs of their RMS difference.

    Args:
        images: (P, n, 3, H, W) uint8, n >= 2 images of each of P prompts.

    Returns:
        0 if all images of each prompt are the same, and 255 between black and white.
    """
    small = torch.nn.functional.adaptive_avg_pool2d(images.flatten(0, 1).float(), VIEWED_AT)
    vectors = small.unflatten(0, images.shape[:2]).flatten(2).double()
    distances = torch.stack([torch.pdist(prompt).mean() for prompt in vectors])
    return (distances.mean() / vectors.shape[-1] ** 0.5).item()


def pixel_detail(images: torch.Tensor) -> float:
    """The mean absolute difference of neighbouring pixels, up to 255: low if blurred, high if grainy.

    Args:
        images: (N, 3, H, W) uint8.
    """
    values = images.double()
    differences = (values.diff(dim=-1).abs().mean(), values.diff(dim=-2).abs().mean())
    return (sum(differences) / 2).item()
