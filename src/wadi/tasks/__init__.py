"""Uses of a one-step student: steered by condition maps, from other images, larger, with new words."""

from wadi.tasks.control import condition_map, edge_map, load_controlnet, with_controlnets
from wadi.tasks.editing import Sampling, image_to_image, inpaint
from wadi.tasks.high_resolution import growth, redilated

__all__ = [
    "Sampling",
    "condition_map",
    "edge_map",
    "growth",
    "image_to_image",
    "inpaint",
    "load_controlnet",
    "redilated",
    "with_controlnets",
]
