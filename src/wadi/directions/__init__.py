"""The evidence: how far the directions of weights moved, and the adapter that moves them so."""

from wadi.directions.extract import Extraction, LayerFigures, OtherFigures, extract_adapter
from wadi.directions.fit import best_angles, best_factors, explained_share, norm_change

__all__ = [
    "Extraction",
    "LayerFigures",
    "OtherFigures",
    "best_angles",
    "best_factors",
    "explained_share",
    "extract_adapter",
    "norm_change",
]
