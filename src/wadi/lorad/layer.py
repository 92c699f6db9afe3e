"""The layers of the LoRaD adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from wadi.lorad.config import LoRaDConfig
from wadi.lorad.rotation import Factors, rotated_linear, rotated_weight
from wadi.lorad.small import SmallLinear, backend_of

SHARED = "shared_by_views"
"""Attribute of a Parameter that several networks share. Whoever shares it sets this; it forbids merging."""


class LoRaDLayer(nn.Module, BaseTunerLayer):
    """A layer whose weight, read as a matrix (out, fan-in), is turned by the angles of the active adapters.

    A linear layer's weight may be stored small (see `wadi.lorad.small.backend_of`); it is then frozen, is
    widened for as long as it is used, and cannot be merged into.

    The base layer's own `forward` is bypassed while an adapter is active: hooks on the base layer
    (sequential CPU offload, layerwise casting) do not run then. A trainable base weight gets its gradient,
    a frozen one costs nothing.

    Merging writes into the base's `nn.Parameter` and keeps a copy of the original weight (twice the memory of
    the adapted weights), so unmerging restores the original bit for bit. If another tuner adds to the weight
    meanwhile, as a LoRA around this layer does, its part stays. So the two may be unmerged in any order.
    Merge LoRaD first, because it turns everything that is in the weight. Other modules with the same
    Parameter (tied weights) see the merged weight too, as with PEFT's LoRA.

    Attributes:
        in_features, out_features: of the base layer; for convolutions its input and output channels.

    Raises:
        TypeError: the base layer is quantized in a way that cannot be read, or already carries another kind
            of adapter.
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
        self.quantization_backend = backend_of(base_layer)
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lorad_A = nn.ParameterDict({})
        self.lorad_B = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_factors: list[Factors] = []  # copies: the adapter may be trained or deleted meanwhile
        self._original: torch.Tensor | None = None  # no Parameter and no buffer: not in the state dict
        self._written = 0  # the checksum of the weight that was merged
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config)

    def update_layer(self, adapter_name: str, r: int, config: LoRaDConfig) -> None:
        """Add an adapter of rank `r`; it turns nothing until it is trained or loaded (see `init_weights`)."""
        out_features, fan_in = self._matrix_shape()
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
        """Make `adapter` turn by `scale` times its angles: 0 gives the base, 0.5 half the angles."""
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
        weight = self.get_base_weight() if self._original is None else self._original.to(self.weight)
        A = self.lorad_A[adapter].detach()
        wide = weight.to(torch.promote_types(A.dtype, torch.float32))
        return (self._rotated(wide, self._factors([adapter])) - wide).detach().to(A.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT that `get_delta_weight` can be approximated by a LoRA."""
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Turn the base weight, in place, by the angles of `adapter_names` (default: the active ones).

        All merged adapters turn the original weight at once, each with the scale it had when it was merged.

        Raises:
            ValueError: `safe_merge`, and the turned weight is not finite; or the weight cannot be written to:
                it has no values (it is offloaded), or is shared by the views of one base.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        weight, added = self._writable_weight(), self._added_by_others()
        original = (weight if self._original is None else self._original).detach().to(weight, copy=True)
        factors = [Factors(A.detach().clone(), B.detach().clone(), s) for A, B, s in self._factors(names)]
        turned = self._turned(original, self._merged_factors + factors)
        if safe_merge and not torch.isfinite(turned).all():
            raise ValueError(
                "NaNs detected in the merged weights. "
                f"The adapter {self._broken(names, original)} seems to be broken"
            )
        self._write(turned, added)
        self._original = original
        self._merged_factors += factors
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the original weight bit for bit, plus what others have added to it since the merge.

        Raises:
            ValueError: as `merge`, for a weight that cannot be written to.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight, added = self._writable_weight(), self._added_by_others()
        self._write(self._original.to(weight), added)
        self._original, self._merged_factors = None, []
        self.merged_adapters.clear()

    def forward(self, x: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
        """Apply the base layer with its weight turned by the sum of the active adapters' angles.

        Args:
            x: what the base layer takes.
            adapter_names: for each sample of `x` the one adapter that turns the weight for it, instead of the
                active ones; `"__base__"`, or an adapter that this layer lacks, for the weight as it is.

        Raises:
            ValueError: `adapter_names` is not as long as `x`, or adapters are merged.
        """
        if adapter_names is not None:
            return self._mixed_forward(x, adapter_names)
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        factors = [] if self.merged else self._factors(self._active())
        if not factors:
            return self.base_layer(x)
        return self._rotated_forward(x, factors)

    def _mixed_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Apply to each sample its own adapter, with one forward for each adapter in the batch."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, "
                "please call `unmerge_adapter` first."
            )
        samples: dict[str | None, list[int]] = {}
        for index, name in enumerate(adapter_names):
            turns = name in self.r and not self._disable_adapters
            samples.setdefault(name if turns else None, []).append(index)
        outputs = [
            self.base_layer(x[indices])
            if name is None
            else self._rotated_forward(x[indices], self._factors([name]))
            for name, indices in samples.items()
        ]
        order = torch.tensor([index for indices in samples.values() for index in indices])
        return torch.cat(outputs)[order.argsort().to(x.device)]

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.r]

    def _factors(self, names: list[str]) -> list[Factors]:
        return [Factors(self.lorad_A[name], self.lorad_B[name], self.scaling[name]) for name in names]

    def _writable_weight(self) -> nn.Parameter:
        weight = self.get_base_layer().weight
        if self.quantization_backend is not None:
            raise ValueError(
                f"The weight is stored small ({self.quantization_backend.backend_name}), and merging would "
                "round it once more: load the model in full precision and merge the adapter into that."
            )
        if weight.is_meta:
            raise ValueError(
                f"The weight of {self.get_base_layer()} has no values (it is on the meta device): load or "
                "onload the model before you merge or unmerge."
            )
        if getattr(weight, SHARED, False):
            raise ValueError(
                "The weight is shared by several views of one base, and merging would change all of them: "
                "merge a copy (`copy.deepcopy`) of the network instead."
            )
        return weight

    @torch.no_grad()
    def _turned(self, weight: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        """Turn `weight` by copies of factors, which are moved to its device."""
        device = weight.device
        return self._rotated(weight, [Factors(A.to(device), B.to(device), scale) for A, B, scale in factors])

    def _added_by_others(self) -> torch.Tensor | None:
        """Return what others have added to the merged weight, in float32 or wider; None if nothing."""
        weight = self.get_base_layer().weight.detach()
        # a checksum, because turning again may round differently (threads, TF32, another device)
        if not self.merged or _checksum(weight) == self._written:
            return None
        turned = self._turned(self._original.to(weight), self._merged_factors)
        return _wide(weight) - _wide(turned)

    @torch.no_grad()
    def _write(self, values: torch.Tensor, added: torch.Tensor | None) -> None:
        weight = self.get_base_layer().weight
        weight.copy_(values if added is None else _wide(values) + added)
        self._written = _checksum(values)  # without what others added, because they remove it themselves

    def _broken(self, names: list[str], original: torch.Tensor) -> str:
        """Return the first adapter that spoils the weight alone, or the last one."""
        alone = ((name, self._turned(original, self._factors([name]))) for name in names)
        return next((name for name, turned in alone if not torch.isfinite(turned).all()), names[-1])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LoRaDLayer:
        """Move or cast the kept original together with the model."""
        untouched = self.merged and _checksum(self.weight) == self._written
        super()._apply(fn, recurse)
        if self._original is not None:
            self._original = fn(self._original)
        if untouched:
            self._written = _checksum(self.weight)
        return self

    def _rotated(self, weight: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        """Return `weight`, in its own shape and dtype, turned by the sum of the angles."""
        raise NotImplementedError

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """View `weight` as (out, fan-in)."""
        raise NotImplementedError

    def _matrix_shape(self) -> torch.Size | tuple[int, int]:
        """(out, fan-in) of the weight, read as a matrix."""
        return self._as_matrix(self.get_base_layer().weight).shape

    def _rotated_forward(self, x: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return "lorad." + super().__repr__()


class LoRaDLinear(LoRaDLayer):
    """LoRaD on `torch.nn.Linear`, or on transformers' `Conv1D`, whose weight is stored as (in, out)."""

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def _matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features  # the weight itself may be packed

    def _rotated(self, weight: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        return self._as_matrix(rotated_weight(self._as_matrix(weight), factors)).contiguous()

    def _rotated_forward(self, x: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        base_layer = self.base_layer
        if isinstance(base_layer, SmallLinear):
            return base_layer.linear(x, factors)
        if self.quantization_backend is not None:
            return rotated_linear(x, self.get_base_weight, base_layer.bias, factors)
        return rotated_linear(x, self._as_matrix(base_layer.weight), base_layer.bias, factors)


class LoRaDConv(LoRaDLayer):
    """LoRaD on `torch.nn.Conv1d`, `Conv2d` or `Conv3d`: pairs along the flattened axes of a filter.

    A filter has in // groups times the kernel's size weights, for `Conv2d` (in // groups) x kh x kw.

    Backward keeps the turned weight, as any convolution keeps its weight.
    """

    @property
    def groups(self) -> int:
        """The groups of the base layer: PEFT's LoRA asks the layer that it is put around."""
        return self.get_base_layer().groups

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts linear layers only."""
        return False

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def _rotated(self, weight: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        return rotated_weight(weight.flatten(1), factors).view(weight.shape)

    def _rotated_forward(self, x: torch.Tensor, factors: list[Factors]) -> torch.Tensor:
        base_layer = self.base_layer
        # the method behind the forward of a convolution, for its padding modes
        return base_layer._conv_forward(x, self._rotated(base_layer.weight, factors), base_layer.bias)


def _checksum(weight: torch.Tensor) -> int:
    """Return the sum of the bits, read as integers: exact, and the same on every device."""
    if weight.is_meta:
        return 0
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().view(integers).sum(dtype=torch.int64))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
