"""Warn about images that are flagged, not finite, or of one colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from wadi.errors import tell

_HALF = "half precision overflows in some autoencoders; use float32 or bfloat16"


def tell_odd_images(images: Any, flagged: Sequence[bool] | None = None, names: Sequence[str] = ()) -> None:
    """Warn about images that are probably wrong, in one line for each reason with the images' names.

    Args:
        images: N images: PIL images, an array (N, H, W, C), or a tensor (N, C, H, W). For a tensor on a GPU
            this waits for the device.
        flagged: for each image, whether the pipeline's safety checker flagged it, which makes it black.
        names: names of the images; "image 1 of N" and so on if empty.
    """
    names = names or [f"image {i + 1} of {len(images)}" for i in range(len(images))]
    found: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        reason = _FLAGGED if flagged is not None and flagged[i] else _reason(images[i])
        if reason is not None:
            found.setdefault(reason, []).append(name)
    for reason, which in found.items():
        tell(f"{', '.join(which)}: {reason}")


def tell_odd_output(output: Any, names: Sequence[str] = ()) -> None:
    """`tell_odd_images` for the output of a stock pipeline, with its safety checker's flags."""
    tell_odd_images(output.images, getattr(output, "nsfw_content_detected", None), names)


_FLAGGED = "flagged by the model's safety checker, which makes it black; another seed or prompt may help"


def _reason(image: Any) -> str | None:
    if isinstance(image, torch.Tensor):
        image = image.detach().float().cpu().permute(1, 2, 0).numpy()
    pixels = np.asarray(image)
    if pixels.size == 0:
        return None
    if not np.isfinite(pixels).all():
        return f"has values that are not numbers; {_HALF}"
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    if (low != high).any():
        return None
    return f"black all over; {_HALF}" if not high.any() else "one colour all over"
