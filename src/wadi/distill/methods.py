"""What is trained of student and fake model: LoRaD, or to compare with it LoRA, or every weight."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from wadi.distill.config import Method
from wadi.lorad import LoRaDConfig
from wadi.lorad.small import small_layers


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


def merged_state(network: torch.nn.Module, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a network with its adapters merged, on the CPU, by their names without adapters.

    Args:
        network: as `wadi.distill.roles.build_roles` makes it. It is not changed.
        base: the state dict of the network without adapters, in full precision. Adapters of layers that are
            stored in fewer bits are merged into these weights.
    """
    whole = copy.deepcopy(network).to("cpu")
    for name, layer in small_layers(whole).items():
        full = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        full.weight = torch.nn.Parameter(base[_plain(f"{name}.weight")].detach().to("cpu", copy=True))
        full.bias = layer.bias
        whole.set_submodule(name, full)
        if isinstance(owner := whole.get_submodule(name.removesuffix(".base_layer")), BaseTunerLayer):
            owner.quantization_backend = None
    for module in list(whole.modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
    state = {_plain(name): tensor for name, tensor in whole.state_dict().items()}
    return {key: state[key] for key in base}


def _plain(name: str) -> str:
    """What a tensor of a layer with an adapter is called without it."""
    return name.replace(".base_layer.", ".")
