"""What is trained of student and fake model: LoRaD, or to compare with it LoRA, or every weight."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from wadi.distill.config import Method
from wadi.lorad import LoRaDConfig


def method_config(method: Method, like: LoRaDConfig) -> PeftConfig | None:
    """The adapter of a method, on the layers and with the rank of `like`. None if every weight is trained.

    LoRA (arXiv 2106.09685) has alpha = r: its update is B A as it is.
    """
    if method == "full":
        return None
    if method == "lorad":
        return like
    return LoraConfig(
        r=like.r,
        lora_alpha=like.r,
        rank_pattern=like.rank_pattern,
        alpha_pattern=like.rank_pattern,
        target_modules=like.target_modules,
    )


def merged_state(network: torch.nn.Module, keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """The weights of a network with its adapters merged, on the CPU, by their names without adapters.

    Args:
        network: as `wadi.distill.roles.build_roles` makes it. It is not changed.
        keys: names of the state dict of the network without adapters.
    """
    whole = copy.deepcopy(network).to("cpu")
    for module in list(whole.modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in whole.state_dict().items()}
    return {key: state[key] for key in keys}
