"""Figures of generated images: their distance from real images, and their diversity."""

from wadi.metrics.diversity import entropy_bits, spread
from wadi.metrics.frechet import feature_statistics, fewest_images, frechet_distance
from wadi.metrics.precision_recall import precision_recall

__all__ = [
    "entropy_bits",
    "feature_statistics",
    "fewest_images",
    "frechet_distance",
    "precision_recall",
    "spread",
]
