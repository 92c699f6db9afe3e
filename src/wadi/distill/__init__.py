"""Distillation of a diffusion model into a one-step generator by variational score distillation.

Names are imported when they are first used, so that the options alone do not bring diffusers along. The room
itself can be called, so that ``wadi.distill(config)`` works whether or not ``wadi.distill`` was imported.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wadi.backbones import PixArtBackbone, UNetBackbone, load_backbone
    from wadi.distill.cache import EmbeddingCache, Embeddings
    from wadi.distill.config import PRESETS, DistillConfig
    from wadi.distill.draws import StepInputs
    from wadi.distill.loop import train
    from wadi.distill.processes import make_accelerator
    from wadi.distill.prompts import PromptEmbeddings, encode_prompts, read_prompts
    from wadi.distill.run import distill
    from wadi.distill.trainer import Trainer

__all__ = [
    "PRESETS",
    "DistillConfig",
    "EmbeddingCache",
    "Embeddings",
    "PixArtBackbone",
    "PromptEmbeddings",
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
    "PixArtBackbone": ".backbones",
    "PromptEmbeddings": "prompts",
    "StepInputs": "draws",
    "Trainer": "trainer",
    "UNetBackbone": ".backbones",
    "distill": "run",
    "encode_prompts": "prompts",
    "load_backbone": ".backbones",
    "make_accelerator": "processes",
    "read_prompts": "prompts",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Room(ModuleType):
    """A module that can be called, and then is its function `distill`. Importing a module sets a name of its
    package, so `wadi.distill` cannot be that function alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.distill(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
