"""WaDi: one-step text-to-image diffusion by learning how the weights turn (arXiv 2603.08258).

Importing the package registers the LoRaD adapter with PEFT: at once if PEFT is imported already, otherwise
the moment it is. So ``import wadi`` itself takes milliseconds, not PEFT's seconds.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

from wadi._version import __version__
from wadi.errors import WadiError

if TYPE_CHECKING:
    from wadi.lorad import LoRaDConfig, LoRaDModel

__all__ = ["LoRaDConfig", "LoRaDModel", "WadiError", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LoRaDConfig", "LoRaDModel"):
        return getattr(importlib.import_module("wadi.lorad"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _RegisterAfterPeft(MetaPathFinder):
    """Lets the other finders find PEFT, and imports `wadi.lorad` (which registers) once PEFT has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then_register(module: Any) -> None:
                run(module)
                importlib.import_module("wadi.lorad")

            spec.loader.exec_module = run_then_register
        return spec


if "peft" in sys.modules:
    importlib.import_module("wadi.lorad")
else:
    sys.meta_path.insert(0, _RegisterAfterPeft())
