"""How far the lengths and directions of weights moved, and the adapter that moves them so."""

from wadi.directions.compare import Comparison, compare_models, write_comparison
from wadi.directions.extract import Extraction, OtherFigures, extract_adapter
from wadi.directions.figures import LayerChange, LayerFigures
from wadi.directions.fit import best_angles, best_factors, explained_share, norm_change
from wadi.directions.swap import swap_rows
from wadi.directions.weights import open_weights

__all__ = [
    "Comparison",
    "Extraction",
    "LayerChange",
    "LayerFigures",
    "OtherFigures",
    "best_angles",
    "best_factors",
    "compare_models",
    "explained_share",
    "extract_adapter",
    "norm_change",
    "open_weights",
    "swap_rows",
    "write_comparison",
]
