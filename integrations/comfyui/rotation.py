"""The mathematics of LoRaD: the rows of a weight turned, pair by pair of inputs."""

from __future__ import annotations

import torch


def turned(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Turn the inputs 2i and 2i + 1 of every row by the angle ``strength * (A B)[row, i]``.

    Args:
        weight: (out, ...), any floating dtype. The axes after the first are read as one axis of inputs; if
            their number is odd, the last input stays as it is.
        A: (out, r).
        B: (r, inputs // 2).
        strength: what the angles are multiplied by. Minus the strength undoes it, and strengths add up.

    Returns:
        The turned weight in its own shape and on its own device, float32, or float64 if the weight is.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide = weight.to(dtype).flatten(1)
    A, B = (factor.to(weight.device, dtype) for factor in (A, B))
    theta = (A * strength) @ B
    cos, sin = theta.cos(), theta.sin()
    paired = 2 * (wide.shape[1] // 2)
    first, second = wide[:, 0:paired:2], wide[:, 1:paired:2]
    result = wide.clone()
    result[:, 0:paired:2] = first * cos - second * sin
    result[:, 1:paired:2] = first * sin + second * cos
    return result.view(weight.shape)
