"""Frozen linear layers whose weights are stored small: ours, and those that other libraries quantize.

Ours stores a weight W (out, in) as Q in few bits and one number a row in float32:

    W ~ Q s        int8: Q = round(W / u) with u = max |W| / 127 of the row        s = |W| / |Q|

so that the norm of every row, which LoRaD keeps, is that of W exactly, at a slightly smaller error than that
of s = u. Both are frozen Parameters and no buffers: views share them, and what shards or moves Parameters
takes them along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wadi.lorad.rotation import Factors, rotated_linear, widen


def store_small(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Store a weight in fewer bits.

    Args:
        weight: (out, in), any floating dtype, finite.
        dtype: to store it in: int8, or a floating one such as bfloat16.

    Returns:
        The small weight (out, in), and what its rows are multiplied by, (out, 1) float32; see `widen`.
    """
    wide = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    # the largest of a row is divided by first, so that no norm over- or underflows
    largest = wide.abs().amax(dim=1, keepdim=True)
    unit = largest / 127 if dtype == torch.int8 else largest
    unit = torch.where(unit > 0, unit, 1)
    wide = wide / unit
    small = (wide.round() if dtype == torch.int8 else wide).to(dtype)
    norm = torch.linalg.vector_norm(small.to(wide.dtype), dim=1, keepdim=True)
    scale = unit * torch.linalg.vector_norm(wide, dim=1, keepdim=True) / torch.where(norm > 0, norm, 1)
    return small, scale.float()


class SmallLinear(nn.Linear):
    """A frozen `nn.Linear` whose weight is stored small, and widened for as long as it is used.

    It computes in the dtype of its input, or in that of the surrounding `torch.autocast` region. Backward
    keeps the small weight and widens it again. Casting it (`.to(torch.bfloat16)`) casts the bias alone.

    Args:
        linear: the layer in full precision; its bias is taken over as it is.
        dtype: to store the weight in, see `store_small`.

    Attributes:
        weight: (out, in), in the storage dtype; not the layer's weight without `scale`, see `wide_weight`.
        scale: (out, 1), float32.
    """

    compute_dtype = torch.float32  # where PEFT finds it, in what it makes the adapters of a quantized layer

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = torch.int8) -> None:
        nn.Module.__init__(self)  # past nn.Linear's, which would make a weight of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        small, scale = store_small(linear.weight, dtype)
        self.weight = nn.Parameter(small, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self.training = linear.training

    def wide_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (out, in) that is stored."""
        return widen(self.weight, self.scale, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return self.linear(x)

    def linear(self, x: torch.Tensor, adapters: Sequence[Factors] = ()) -> torch.Tensor:
        """Apply the layer with its weight turned by adapters: see `rotated_linear`."""
        return rotated_linear(x, self.weight, self.bias, adapters, self.scale)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SmallLinear:
        """Let weight and scale move, but not change their dtypes: norms are exact with these alone."""
        small, scale = self.weight.data, self.scale.data
        super()._apply(fn, recurse)
        for parameter, kept in ((self.weight, small), (self.scale, scale)):
            if parameter.dtype != kept.dtype:
                parameter.data = kept.to(parameter.device)
        return self


class SmallBackend(QuantizationBackend):
    """What PEFT asks of a `SmallLinear`."""

    layer_type = "linear"
    supports_merge = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.backend_name = f"{dtype} with a scale a row".removeprefix("torch.")

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """The weight (out, in), float32."""
        return base_layer.wide_weight()


def backend_of(layer: nn.Module) -> QuantizationBackend | None:
    """What reads the weight of a layer that stores it small; None for a plain layer.

    Beside `SmallLinear` these are the linear layers of bitsandbytes (8 and 4 bits) and torchao, through PEFT.

    Raises:
        TypeError: the layer is quantized in a way of which no weight can be read.
    """
    if isinstance(layer, SmallLinear):
        return SmallBackend(layer.weight.dtype)
    # PEFT wants to know how torchao would quantize again, which only merging does
    backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=_never)
    if backend is not None and backend.supports_merge and isinstance(layer, nn.Linear):
        return backend
    weight = layer.weight
    wrapped = is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)
    if backend is not None or wrapped or not weight.is_floating_point():
        kind = type(weight).__name__ if backend is None else backend.backend_name
        raise TypeError(
            f"LoRaD cannot read the weight of a {type(layer).__name__} that is quantized ({kind}); load the "
            "model in full precision."
        )
    return None


def small_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a network whose weights are stored small, by name.

    Raises:
        TypeError: as `backend_of`.
    """
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and backend_of(layer) is not None
    }


def rounds_inputs(layer: nn.Linear) -> bool:
    """Whether a quantized layer rounds its inputs too, which an adapter on it does not."""
    weight = layer.weight
    return (
        hasattr(layer, "state")  # bitsandbytes, 8 bits
        or getattr(weight, "act_quant_kwargs", None) is not None  # torchao
        or type(weight).__name__ == "LinearActivationQuantizedTensor"  # torchao before 0.15
    )


def plain_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that a network would have in full precision.

    What is stored small has its names and shapes there, and no values (it is on the meta device).
    """
    state = dict(network.state_dict())
    for name, layer in small_layers(network).items():
        weight = f"{name}.weight"
        for key in [key for key in state if key.startswith(f"{name}.") and key != f"{name}.bias"]:
            del state[key]
        state[weight] = torch.empty(layer.out_features, layer.in_features, device="meta")
    return state


def _never() -> Any:
    raise NotImplementedError("a quantized weight is not written to")
