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
    versions = (None if x.is_inference() else x._version for x in tensors)
    return (*((id(x), x.data_ptr()) for x in tensors), *versions, *(adapter.scale for adapter in factors))


class rotated_once:  # noqa: N801 - used like torch.no_grad
    """Turn the adapted weights of a model once, all together, for every forward inside.

        with rotated_once(model) as weights:
            loss(model(x)).backward()       # the weights were turned on entering
            optimizer.step()                # from here on each forward turns them anew, as without the block,
            weights.refresh()               # until they are turned again

    Costs one copy of the adapted weights, in the dtype of the base; on a GPU the allocator may hold an
    older one beside it for a while, and a CUDA graph one for each `refresh` that it captures. Backward
    needs the turned weights alone, not the originals. A layer whose parameters, scale or active adapters a
    torch optimizer or an in-place operation has changed since is turned as it would be outside. Writes
    through `.data`, as of `EMAModel.copy_to` and `restore` of diffusers, and the replay of a CUDA graph go
    unnoticed: call `refresh` after them. With gradient checkpointing backward must run inside the block,
    where the recomputation finds what the forward found; second derivatives must be taken outside. Merged
    and disabled layers, which turn nothing, are left alone, and so are layers with a trainable base, and
    copies of the model.

    Args:
        model: a module with LoRaD layers, injected or wrapped by PEFT, or a view of one.
        enabled: False does nothing.
        unchecked: let compiled code use the turned weights too. It cannot see whether they are still right:
            call `refresh` after every change.
    """

    def __init__(self, model: nn.Module, enabled: bool = True, unchecked: bool = False) -> None:
        self.unchecked, self.inside = unchecked, False
        modules = model.modules() if enabled else ()
        self.layers = [module for module in modules if isinstance(module, LoRaDLayer)]

    def __enter__(self) -> rotated_once:
        self.inside = True
        self.refresh()
        return self

    def refresh(self) -> None:
        """Turn the weights again, by the angles as they are now.

        Raises:
            RuntimeError: outside the block.
        """
        if not self.inside:
            raise RuntimeError("rotated_once: refresh works inside the with block only")
        self._forget()
        layers = [layer for layer in self.layers if layer.turns and not layer.base_layer.weight.requires_grad]
        factors = [layer.active_factors() for layer in layers]
        weights = [layer.matrix() for layer in layers]
        turned: list[torch.Tensor | None] = [None] * len(layers)
        for device in {weight.device for weight in weights}:
            here = [i for i, weight in enumerate(weights) if weight.device == device]
            together = rotated_weights([weights[i] for i in here], [factors[i] for i in here])
            for i, weight in zip(here, together, strict=True):
                turned[i] = weight
        for layer, weight, adapters in zip(layers, turned, factors, strict=True):
            base = layer.base_layer.weight
            layer.kept = Kept(weight, fingerprint(base, adapters), (base, adapters), self.unchecked)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside = False
        self._forget()

    def _forget(self) -> None:
        for layer in self.layers:
            layer.kept = None
