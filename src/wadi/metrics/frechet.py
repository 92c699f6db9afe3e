"""Frechet distance between two sets of features, computed by torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance


def feature_statistics(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """The statistics of features that a Frechet distance needs, as the sums that torchmetrics keeps.

    Args:
        features: (N, D), any float dtype.

    Returns:
        On the CPU: ``sum`` (D,) and ``cov_sum`` (D, D), the sum of outer products, float64, and ``count``
            int64.
    """
    features = features.double().cpu()
    return {"sum": features.sum(0), "cov_sum": features.T @ features, "count": torch.tensor(len(features))}


def fewest_images(features: int) -> int:
    """The least number of images on each side of a Frechet distance: twice the number of features.

    With fewer images the covariances are singular or nearly so, and the distance depends on the number of
    images more than on what they show.
    """
    return 2 * features


def frechet_distance(real: Mapping[str, torch.Tensor], fake: Mapping[str, torch.Tensor]) -> float:
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al., arXiv 1706.08500).

    Args:
        real: statistics from :func:`feature_statistics`.
        fake: the same for the other set, with the same number of features.
    """
    extractor = nn.Identity()
    extractor.num_features = len(real["sum"])
    metric = FrechetInceptionDistance(feature=extractor)
    for name, statistics in (("real", real), ("fake", fake)):
        setattr(metric, f"{name}_features_sum", statistics["sum"].double())
        setattr(metric, f"{name}_features_cov_sum", statistics["cov_sum"].double())
        setattr(metric, f"{name}_features_num_samples", statistics["count"])
    metric.orig_dtype = torch.float64
    # without an update() torchmetrics would warn that there is nothing to compute
    metric._update_count = 1
    return metric.compute().item()
