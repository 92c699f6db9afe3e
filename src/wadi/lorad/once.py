"""Weights turned once for all their uses: `rotated_once`."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import nn

from wadi.lorad.layer import LoRaDLayer
from wadi.lorad.rotation import Factors, rotated_weights


class Kept(NamedTuple):
    """A turned weight and what it was made of."""

    weight: torch.Tensor  # (out, fan-in), the dtype of the base's weight
    source: tuple
    held: tuple  # what it was made of, alive, so that no other tensor takes its id or address
    unchecked: bool  # whether compiled code, which cannot ask, may use it

    def fits(self, base: torch.Tensor, factors: Sequence[Factors]) -> bool:
        """Whether base and factors are still what they were: the same tensors, not written to since."""
        if torch.compiler.is_compiling():
            return self.unchecked
        return self.source == fingerprint(base, factors)


def fingerprint(base: torch.Tensor, factors: Sequence[Factors]) -> tuple:
    """Which tensors, where, in which version, at which scale."""
    tensors = [base, *(tensor for adapter in factors for tensor in adapter[:2])]
    return (*((id(x), x.data_ptr(), x._version) for x in tensors), *(adapter.scale for adapter in factors))


class rotated_once:  # noqa: N801 - used like torch.no_grad
    """Turn the adapted weights of a model once, all together, for every forward inside.

        with rotated_once(model) as weights:
            loss(model(x)).backward()       # the weights were turned on entering
            optimizer.step()                # from here on each forward turns them anew, as without the block,
            weights.refresh()               # until they are turned again

    Costs one copy of the adapted weights, in the dtype of the base. Backward needs them alone, not the
    originals. A layer whose parameters, scale or active adapters have changed since is turned as it would be
    outside, so the result is never that of old angles (only in-place writes through `.data` go unnoticed, as
    by autograd). With gradient checkpointing backward must run inside
    the block, where the recomputation finds what the forward found. Merged and disabled layers, which turn
    nothing, are left alone, and so are layers with a trainable base.

    Second derivatives must be taken outside.

    Args:
        model: a module with LoRaD layers, injected or wrapped by PEFT, or a view of one.
        enabled: False does nothing.
        unchecked: let compiled code use the turned weights too. It cannot see whether they are still right:
            call `refresh` after every change.
    """

    def __init__(self, model: nn.Module, enabled: bool = True, unchecked: bool = False) -> None:
        self.unchecked = unchecked
        modules = model.modules() if enabled else ()
        self.layers = [module for module in modules if isinstance(module, LoRaDLayer)]

    def __enter__(self) -> rotated_once:
        self.refresh()
        return self

    def refresh(self) -> None:
        """Turn the weights again, by the angles as they are now."""
        self._forget()
        layers = [layer for layer in self.layers if layer.turns and not layer.base_layer.weight.requires_grad]
        factors = [layer.active_factors() for layer in layers]
        weights = [layer.matrix() for layer in layers]
        for layer, weight, adapters in zip(layers, rotated_weights(weights, factors), factors, strict=True):
            base = layer.base_layer.weight
            layer.kept = Kept(weight, fingerprint(base, adapters), (base, adapters), self.unchecked)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()

    def _forget(self) -> None:
        for layer in self.layers:
            layer.kept = None
