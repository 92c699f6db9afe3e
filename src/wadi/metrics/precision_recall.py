"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

Its own few lines, because the maintained implementations come with torchvision and an Inception network.
"""

from __future__ import annotations

import torch

from wadi.errors import WadiError

NEIGHBOURS = 3
"""As in the paper."""


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of fake samples inside the real manifold, and of real samples inside the fake one.

    A manifold is the union of balls around its samples, each reaching to the k-th nearest other sample.

    Args:
        real: (N, D) features.
        fake: (M, D) features.
        k: neighbours, 3 in the paper.

    Raises:
        WadiError: a side has no k others.
    """
    if min(len(real), len(fake)) <= k:
        raise WadiError(
            f"precision and recall of {k} neighbours: need at least {k + 1} images of each side; "
            f"there are {len(real)} real and {len(fake)} generated ones"
        )
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def _share_inside(samples: torch.Tensor, manifold: torch.Tensor, k: int) -> float:
    samples, manifold = samples.float(), manifold.float()
    # The nearest sample of each is itself, at distance zero: hence k + 1.
    radius = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(1000)])
    inside = [(torch.cdist(part, manifold) <= radius).any(1) for part in samples.split(1000)]
    return torch.cat(inside).double().mean().item()
