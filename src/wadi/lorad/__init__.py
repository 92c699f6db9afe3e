"""LoRaD, low-rank rotation of weights, as a PEFT tuner. Importing this package registers it with PEFT."""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method

from wadi.lorad.config import LoRaDConfig
from wadi.lorad.io import average_adapters, load_adapter, save_adapter
from wadi.lorad.layer import LoRaDConv, LoRaDLayer, LoRaDLinear
from wadi.lorad.model import LoRaDModel

__all__ = [
    "LoRaDConfig",
    "LoRaDConv",
    "LoRaDLayer",
    "LoRaDLinear",
    "LoRaDModel",
    "average_adapters",
    "load_adapter",
    "save_adapter",
]


def _add_peft_type(name: str) -> None:
    """Add a member to the `PeftType` enum, as PEFT's own methods have one: PEFT offers no other hook."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)
    member.__objclass__ = PeftType
    setattr(PeftType, name, member)  # before the enum knows the member, because members cannot be assigned
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


if "LORAD" not in PeftType.__members__:  # a PEFT that brings its own LoRaD wins
    _add_peft_type("LORAD")
    register_peft_method(name="lorad", config_cls=LoRaDConfig, model_cls=LoRaDModel)
