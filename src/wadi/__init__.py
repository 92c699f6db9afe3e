"""WaDi: one-step text-to-image diffusion by learning how the weights turn (arXiv 2603.08258).

What people import, each name loaded when it is first used, so that ``import wadi`` itself takes milliseconds.
PEFT knows the LoRaD adapter once `wadi.lorad` is imported, which ``from wadi import LoRaDConfig`` does too.
"""

import importlib
from typing import TYPE_CHECKING, Any

from wadi._version import __version__
from wadi.errors import WadiError

if TYPE_CHECKING:
    from wadi.backbones import load_backbone
    from wadi.distill.config import DistillConfig
    from wadi.distill.run import distill
    from wadi.lorad import LoRaDConfig, LoRaDModel
    from wadi.onestep.adapters import merge_adapters as merge
    from wadi.onestep.export import export_pipeline as export
    from wadi.onestep.pipeline import StudentPipeline

__all__ = [
    "DistillConfig",
    "LoRaDConfig",
    "LoRaDModel",
    "StudentPipeline",
    "WadiError",
    "__version__",
    "distill",
    "export",
    "load_backbone",
    "merge",
]

_PLACES = {
    "DistillConfig": "wadi.distill.config:DistillConfig",
    "LoRaDConfig": "wadi.lorad:LoRaDConfig",
    "LoRaDModel": "wadi.lorad:LoRaDModel",
    "StudentPipeline": "wadi.onestep.pipeline:StudentPipeline",
    "export": "wadi.onestep.export:export_pipeline",
    "load_backbone": "wadi.backbones:load_backbone",
    "merge": "wadi.onestep.adapters:merge_adapters",
}


def __getattr__(name: str) -> Any:
    if name == "distill":  # the room itself, which can be called
        return importlib.import_module("wadi.distill")
    if name in _PLACES:
        module, _, attribute = _PLACES[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
