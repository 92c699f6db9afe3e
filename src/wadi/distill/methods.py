"""What is trained of student and fake model: LoRaD, or for comparison another adapter, or everything."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from peft import LoraConfig, OFTConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from wadi.distill.config import Method
from wadi.lorad import LoRaDConfig


def method_config(method: Method, like: LoRaDConfig) -> PeftConfig | None:
    """The adapter of a method on the layers and with the rank of `like`; None where everything is trained.

    LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353) have alpha = r: their update is B A as it is. OFT
    (arXiv 2306.07280) turns the input in blocks of r features, or of the nearest number that divides them.
    """
    if method == "full":
        return None
    if method == "lorad":
        return like
    if method == "oft":
        return OFTConfig(r=0, oft_block_size=like.r, target_modules=like.target_modules)
    return LoraConfig(
        r=like.r,
        lora_alpha=like.r,
        rank_pattern=like.rank_pattern,
        alpha_pattern=like.rank_pattern,
        target_modules=like.target_modules,
        use_dora=method == "dora",
    )


def merged_state(network: torch.nn.Module, keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """Weights of a network with its adapters merged, on the CPU, by their names without adapters.

    Args:
        network: as `wadi.distill.roles.build_roles` makes it; stays as it is.
        keys: names of the state dict of the network without adapters.
    """
    whole = copy.deepcopy(network).to("cpu")
    for module in list(whole.modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in whole.state_dict().items()}
    return {key: state[key] for key in keys}
