"""The layers of the LoRaD adapter."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from wadi.lorad.config import LoRaDConfig
from wadi.lorad.rotation import Factors, rotated_linear, rotated_weight


class LoRaDLayer(nn.Module, BaseTunerLayer):
    """A layer whose weight, read as a matrix (out, fan-in), is turned by the angles of the active adapters.

    The base layer's own `forward` is bypassed while an adapter is active: hooks on the base layer
    (sequential CPU offload, layerwise casting) do not run then. A trainable base weight gets its gradient,
    a frozen one costs nothing.

    While merged, the layer keeps the original weight beside the turned one (twice the memory of the adapted
    weights), so unmerging restores the very same `nn.Parameter` bit for bit; other modules that share it are
    not affected by a merge.

    Raises:
        TypeError: the base layer is quantized or already carries another kind of adapter.
        ValueError: the fan-in is less than 2: there is nothing to turn.
    """

    adapter_layer_names = ("lorad_A", "lorad_B")
    other_param_names = ("r", "scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoRaDConfig, r: int) -> None:
        super().__init__()
        if isinstance(base_layer, BaseTunerLayer):
            raise TypeError(
                f"LoRaD cannot wrap {type(base_layer).__name__}; merge or unload that adapter first."
            )
        if not base_layer.weight.is_floating_point():
            raise TypeError(f"LoRaD needs a floating-point weight, {type(base_layer).__name__} is quantized.")
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lorad_A = nn.ParameterDict({})
        self.lorad_B = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_factors: list[Factors] = []
        self._original_weight: list[
            nn.Parameter
        ] = []  # in a list: a Parameter attribute would enter the state dict
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config)

    def update_layer(self, adapter_name: str, r: int, config: LoRaDConfig) -> None:
        """Add an adapter of rank `r`; it turns nothing until it is trained or loaded (see `init_weights`)."""
        out_features, fan_in = self._as_matrix(self.get_base_layer().weight).shape
        if fan_in < 2:
            raise ValueError(
                f"LoRaD turns pairs of inputs, {self.get_base_layer()} has a fan-in of {fan_in}."
            )
        self.r[adapter_name] = r
        self.scaling[adapter_name] = 1.0
        self.lorad_A[adapter_name] = nn.Parameter(torch.empty(out_features, r))
        self.lorad_B[adapter_name] = nn.Parameter(torch.empty(r, fan_in // 2))
        self.reset_lorad_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_lorad_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Set A to zero (`init_weights`) or to Xavier uniform, and B to Xavier uniform."""
        if init_weights:
            nn.init.zeros_(self.lorad_A[adapter_name])
        else:
            nn.init.xavier_uniform_(self.lorad_A[adapter_name])
        nn.init.xavier_uniform_(self.lorad_B[adapter_name])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let `adapter` turn by `scale` times its angles: 0 is the base, 0.5 half the angle."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        for adapter in self._active():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters, or set them to 1 without `scale`."""
        for adapter in self._active():
            self.scaling[adapter] = 1.0 if scale is None else self.scaling[adapter] / scale

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return turned minus original weight for one adapter: the weight's shape, the dtype of A."""
        weight = self._unmerged_weight().detach()
        A = self.lorad_A[adapter].detach()
        wide = weight.to(torch.promote_types(A.dtype, torch.float32))
        return (self._rotated(wide, self._factors([adapter])) - wide).detach().to(A.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that `get_delta_weight` can be approximated by a LoRA."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Turn the base weight by the angles of `adapter_names` (default: the active ones).

        All merged adapters turn the original weight at once, each with the scale it had when it was merged.

        Raises:
            ValueError: `safe_merge`, and the turned weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        base_layer, original = self.get_base_layer(), self._unmerged_weight()
        factors = self._merged_factors + self._factors(names)
        with torch.no_grad():
            weight = self._rotated(original, factors)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        base_layer.weight = nn.Parameter(weight, requires_grad=original.requires_grad)
        self._original_weight = [original]
        self._merged_factors = factors
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base_layer, original = self.get_base_layer(), self._unmerged_weight()
        original.data = original.data.to(base_layer.weight)  # the model may have moved while it was merged
        base_layer.weight = original
        self._original_weight, self._merged_factors = [], []
        self.merged_adapters.clear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the base layer with its weight turned by the sum of the active adapters' angles."""
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        factors = [] if self.merged else self._factors(self._active())
        if not factors:
            return self.base_layer(x)
        return self._rotated_forward(x, factors)

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.r]

    def _factors(self, names: list[str]) -> list[Factors]:
        return [Factors(self.lorad_A[name], self.lorad_B[name], self.scaling[name]) for name in names]

    def _unmerged_weight(self) -> nn.Parameter:
        return self._original_weight[0] if self._original_weight else self.get_base_layer().weight

    def _rotated(self, weight: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        """Return `weight`, in its own shape and dtype, turned by the sum of the angles."""
        raise NotImplementedError

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """View `weight` as (out, fan-in)."""
        raise NotImplementedError

    def _rotated_forward(self, x: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return "lorad." + super().__repr__()


class LoRaDLinear(LoRaDLayer):
    """LoRaD on `torch.nn.Linear`, or on transformers' `Conv1D`, whose weight is stored as (in, out)."""

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def _rotated(self, weight: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        return self._as_matrix(rotated_weight(self._as_matrix(weight), factors)).contiguous()

    def _rotated_forward(self, x: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        base_layer = self.base_layer
        return rotated_linear(x, self._as_matrix(base_layer.weight), base_layer.bias, factors)


class LoRaDConv2d(LoRaDLayer):
    """LoRaD on `torch.nn.Conv2d`: pairs along the flattened (in // groups) x kh x kw axis.

    Backward keeps the turned weight, as any convolution keeps its weight.
    """

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts linear layers only."""
        return False

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def _rotated(self, weight: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        return rotated_weight(weight.flatten(1), factors).view(weight.shape)

    def _rotated_forward(self, x: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        base_layer = self.base_layer
        # the method behind Conv2d.forward, for its padding modes
        return base_layer._conv_forward(x, self._rotated(base_layer.weight, factors), base_layer.bias)
