"""WaDi: one-step text-to-image diffusion by learning how the weights turn (arXiv 2603.08258).

Importing the package registers the LoRaD adapter with PEFT.
"""

from wadi._version import __version__
from wadi.errors import WadiError
from wadi.lorad import LoRaDConfig, LoRaDModel

__all__ = ["LoRaDConfig", "LoRaDModel", "WadiError", "__version__"]
