"""The PEFT tuner that puts LoRaD layers into a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from wadi.lorad.config import LoRaDConfig
from wadi.lorad.layer import LoRaDConv, LoRaDLayer, LoRaDLinear
from wadi.lorad.rotation import Factors


class LoRaDModel(BaseTuner):
    """A model whose weights turn (WaDi, arXiv 2603.08258).

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`LoRaDConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    Example:

        >>> import torch
        >>> from peft import get_peft_model
        >>> from wadi import LoRaDConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> model = get_peft_model(base, LoRaDConfig(r=2, target_modules=["0"]))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # r * (out + in / 2)
        16
    """

    prefix: str = "lorad_"
    tuner_layer_cls = LoRaDLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter whose angles are exactly the weighted sum of those of `adapters`.

        Angles add, so A is the concatenation of the weighted A, B that of the B, and the ranks add up.

        Raises:
            ValueError: unknown adapters, a name already in use, or not one weight per adapter.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters:
            raise ValueError(f"Adapters to combine must be among {list(self.peft_config)}, got {adapters}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter {adapter_name!r} already exists.")
        if len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters need as many weights, got {len(weights)}.")

        parts: dict[str, list[Factors]] = {}
        for key, layer in self.model.named_modules():
            if isinstance(layer, LoRaDLayer):
                mine = [
                    (name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.r
                ]
                if mine:
                    parts[key] = [
                        Factors(
                            layer.lorad_A[name].detach() * (weight * layer.scaling[name]),
                            layer.lorad_B[name].detach(),
                        )
                        for name, weight in mine
                    ]
        ranks = {key: sum(part.A.shape[1] for part in layer_parts) for key, layer_parts in parts.items()}
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            r=max(ranks.values()),
            rank_pattern={
                f"^{re.escape(key)}": rank for key, rank in ranks.items() if rank < max(ranks.values())
            },
            target_modules=list(parts),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            init_weights=True,
        )
        self.inject_adapter(self.model, adapter_name)
        for key, layer_parts in parts.items():
            layer = self.model.get_submodule(key)
            layer.lorad_A[adapter_name].data = torch.cat([part.A for part in layer_parts], dim=1)
            layer.lorad_B[adapter_name].data = torch.cat([part.B for part in layer_parts], dim=0)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, the adapter of each sample of a batch, to all adapted layers.

        Raises:
            ValueError: the model is in training mode, or no layer has an adapter of that name.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, (LoRaDLayer, AuxiliaryTrainingWrapper))]
        known = {name for layer in layers if isinstance(layer, LoRaDLayer) for name in layer.r}
        if unknown := set(names) - known - {"__base__"}:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}; "
                f"there are {', '.join(sorted(known))}"
            )
        # beam search repeats the samples after the encoder, if there is one
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else self.model
        before = set() if encoder is self.model else set(encoder.modules())
        repeated = [name for name in names for _ in range(beams)]
        handles = [
            layer.register_forward_pre_hook(
                partial(_with_adapter_names, names=names if layer in before else repeated), with_kwargs=True
            )
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _create_and_replace(
        self,
        peft_config: LoRaDConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        pattern = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        r = peft_config.rank_pattern.get(pattern, peft_config.r)
        if isinstance(target, LoRaDLayer):
            target.update_layer(adapter_name, r, peft_config)
            return
        new_module = self._create_new_module(peft_config, adapter_name, target, r)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter is not trained until it is set active
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(
        peft_config: LoRaDConfig, adapter_name: str, target: nn.Module, r: int
    ) -> LoRaDLayer:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base_layer, NonDynamicallyQuantizableLinear):
            raise TypeError(
                "`torch.nn.MultiheadAttention` uses its `out_proj` past any adapter; exclude that module."
            )
        if isinstance(base_layer, (nn.Linear, Conv1D)):
            return LoRaDLinear(target, adapter_name, peft_config, r)
        if isinstance(base_layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return LoRaDConv(target, adapter_name, peft_config, r)
        raise ValueError(
            f"Target module {target} is not supported. Currently, only the following modules are supported: "
            "`torch.nn.Linear`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, `torch.nn.Conv3d`, "
            "`transformers.pytorch_utils.Conv1D`."
        )


def _with_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], names: list[str]
) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
