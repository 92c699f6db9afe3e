"""Distillation of a diffusion model into a one-step generator by variational score distillation.

Names are imported when they are first used, so that the options alone do not bring diffusers along. The room
itself can be called, so that ``wadi.distill(config)`` works whether or not ``wadi.distill`` was imported.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wadi.distill.config import DistillConfig
    from wadi.distill.draws import StepInputs
    from wadi.distill.loop import train
    from wadi.distill.presets import PRESETS
    from wadi.distill.processes import make_accelerator
    from wadi.distill.run import distill
    from wadi.distill.trainer import Trainer

__all__ = ["PRESETS", "DistillConfig", "StepInputs", "Trainer", "distill", "make_accelerator", "train"]

_MODULE_OF = {
    "PRESETS": "presets",
    "DistillConfig": "config",
    "StepInputs": "draws",
    "Trainer": "trainer",
    "distill": "run",
    "make_accelerator": "processes",
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
