"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

It is implemented here, because the maintained libraries for it need torchvision and an Inception network.
"""

from __future__ import annotations

import torch

from wadi.errors import WadiError

NEIGHBOURS = 3
"""Number of neighbours, as in the paper."""


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """The share of fake samples inside the real manifold, and of real samples inside the fake manifold.

    A manifold is the union of balls around its samples; each ball reaches to the k-th nearest other sample.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        k: number of neighbours.

    Raises:
        WadiError: a set has too few samples.
    """
    if min(len(real), len(fake)) <= k:
        raise WadiError(
            f"precision and recall: need at least {k + 1} images on each side, but there are {len(real)} "
            f"real and {len(fake)} generated images"
        )
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def _share_inside(samples: torch.Tensor, manifold: torch.Tensor, k: int) -> float:
    samples, manifold = samples.float(), manifold.float()
    # the nearest sample to each sample is itself, at distance zero: hence k + 1
    radius = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(1000)])
    inside = [(torch.cdist(part, manifold) <= radius).any(1) for part in samples.split(1000)]
    return torch.cat(inside).double().mean().item()
