"""Distillation of a diffusion model into a one-step generator by variational score distillation.

Names are imported when they are first used, so that the options alone do not bring diffusers along.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wadi.distill.backbone import PixArtBackbone, UNetBackbone, load_backbone
    from wadi.distill.cache import EmbeddingCache, Embeddings
    from wadi.distill.config import PRESETS, DistillConfig
    from wadi.distill.draws import StepInputs
    from wadi.distill.loop import train
    from wadi.distill.processes import make_accelerator
    from wadi.distill.prompts import PromptEmbeddings, encode_prompts, read_prompts
    from wadi.distill.run import distill
    from wadi.distill.text import PromptEncoder
    from wadi.distill.trainer import Trainer

__all__ = [
    "PRESETS",
    "DistillConfig",
    "EmbeddingCache",
    "Embeddings",
    "PixArtBackbone",
    "PromptEmbeddings",
    "PromptEncoder",
    "StepInputs",
    "Trainer",
    "UNetBackbone",
    "distill",
    "encode_prompts",
    "load_backbone",
    "make_accelerator",
    "read_prompts",
    "train",
]

_MODULE_OF = {
    "PRESETS": "config",
    "DistillConfig": "config",
    "EmbeddingCache": "cache",
    "Embeddings": "cache",
    "PixArtBackbone": "backbone",
    "PromptEmbeddings": "prompts",
    "PromptEncoder": "text",
    "StepInputs": "draws",
    "Trainer": "trainer",
    "UNetBackbone": "backbone",
    "distill": "run",
    "encode_prompts": "prompts",
    "load_backbone": "backbone",
    "make_accelerator": "processes",
    "read_prompts": "prompts",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
