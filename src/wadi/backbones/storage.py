"""A frozen base stored in fewer bits than it is computed in; only what adapters turn, layer by layer.

| precision | a weight is stored as | bits a weight |
| --- | --- | --- |
| `bf16` | bfloat16 and one float32 number a row | 16 |
| `int8` | an integer and one float32 number a row: see `wadi.lorad.small` | 8 |
| `nf4` | 4 bits in blocks of 64, by bitsandbytes | 4.1 |

All convolutions stay in the compute dtype, and so do the first and the last layer, except in PixArt, whose
student turns its last layer and its projection of the captions too.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from wadi.device import Precision
from wadi.errors import WadiError
from wadi.lorad.small import SmallLinear, backend_of
from wadi.onestep.components import Entry, find_weights, name_in_module, read_tensor


def store_base(
    network: nn.Module,
    names: Collection[str],
    precision: Precision,
    device: torch.device | str,
    folder: Path | None = None,
) -> None:
    """Store linear layers small, one after the other on its way to the device; the rest stays where it is.

    The device never holds more than the small layers and one layer in full precision.

    Args:
        network: on the CPU, in the compute dtype; its layers are replaced.
        names: of the layers.
        precision: what to store them in. Where that is the compute dtype already, nothing is done.
        device: where they are to be.
        folder: the files of the network, from which the weights are read once more as they are there, not
            rounded to the compute dtype; ``None`` for the network's own.

    Raises:
        WadiError: nf4 without a GPU or without bitsandbytes, or the network is quantized already.
    """
    device, dtype = torch.device(device), network.dtype
    check_storage(network, names, precision, device, folder)
    if precision == "bf16" and dtype == torch.bfloat16:
        return
    entries = {} if folder is None else _entries(network, folder)
    for name in names:
        layer = network.get_submodule(name)
        if type(layer) is not nn.Linear:  # it may have another forward than a plain layer
            continue
        if (entry := entries.get(f"{name}.weight")) is not None:
            layer.weight = nn.Parameter(read_tensor(entry), requires_grad=False)
        layer.to(device)
        network.set_submodule(name, _small(layer, precision, dtype))


def check_storage(
    network: nn.Module,
    names: Collection[str],
    precision: Precision,
    device: torch.device | str,
    folder: Path | None = None,
) -> None:
    """Raise what `store_base` would raise with the same arguments; nothing is changed."""
    if precision == "nf4":
        _check_nf4(torch.device(device))
    for name in names:
        _refuse_quantized(network.get_submodule(name), name, precision, folder)


def quantized_in_files(network: nn.Module) -> bool:
    """Whether a network was quantized already in the folder it was loaded from, by whatever library."""
    return getattr(network, "hf_quantizer", None) is not None


def _small(layer: nn.Linear, precision: Precision, dtype: torch.dtype) -> nn.Linear:
    if precision == "nf4":
        return nf4_linear(layer, dtype)
    return SmallLinear(layer, torch.int8 if precision == "int8" else torch.bfloat16)


def nf4_linear(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """Store a layer in nf4 with bitsandbytes, on the device where it is.

    Args:
        layer: in any floating dtype.
        dtype: to compute in.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    sizes = layer.in_features, layer.out_features
    small = Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    small.weight = Params4bit(layer.weight.detach().to(dtype), requires_grad=False, quant_type="nf4")
    small.bias = layer.bias
    return small.to(layer.weight.device)  # quantizes


def _entries(network: nn.Module, folder: Path) -> dict[str, Entry]:
    """Where the files hold what the network calls so."""
    weights, names = find_weights(folder), network.state_dict().keys()
    return {} if weights is None else {name_in_module(k, names): e for k, e in weights.entries.items()}


def _refuse_quantized(layer: nn.Module, name: str, precision: Precision, folder: Path | None) -> None:
    try:
        backend = backend_of(layer)
        kind = None if backend is None else backend.backend_name
    except TypeError:
        kind = type(layer.weight).__name__
    if kind is not None:
        raise WadiError(
            f"--base-precision {precision}: {folder or 'the network'} is quantized already ({kind}, such as "
            f"{name}); omit the option, or name the model in full precision"
        )


def _check_nf4(device: torch.device) -> None:
    if device.type != "cuda":
        raise WadiError("--base-precision nf4: needs a GPU; use int8 here")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise WadiError(
            "--base-precision nf4: needs the package bitsandbytes; pip install 'wadi[nf4]', or use int8"
        ) from error
