"""Adapter folders for models that have an adapter without a `PeftModel` around them, as in diffusers.

The folder is PEFT's: `adapter_config.json` and `adapter_model.safetensors`. `PeftModel.from_pretrained` loads
what `save_adapter` writes, and `load_adapter` what `PeftModel.save_pretrained` writes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import cast_adapter_dtype, set_adapter
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from wadi.files import save_tensors
from wadi.lorad.config import LoRaDConfig
from wadi.lorad.layer import LoRaDLayer
from wadi.outputs import Output

_PREFIX = "base_model.model."  # of every key in PEFT's files; a model without a PeftModel around it has none


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    state_dict: Mapping[str, torch.Tensor] | None = None,
    base_model: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Write one adapter of `model` as a folder. A failure writes nothing.

    Args:
        model: the adapted model, inside a `PeftModel` or not.
        folder: new or empty.
        adapter_name: name of the adapter.
        state_dict: values to write instead of the model's own (for example an average of weights), with the
            keys of `model.state_dict()`; entries of other layers are ignored.
        base_model: hub id or folder of the model without the adapter. PEFT keeps it in the configuration as
            `base_model_name_or_path`. ``None`` keeps the old value.
        overwrite: replace the folder if this function wrote it and nothing else is in it.

    Raises:
        ValueError: `model` has no such LoRaD adapter, or `state_dict` lacks some of its tensors.
        WadiError: `folder` may not or cannot be written; see `wadi.outputs`.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
        state_dict = state_dict and {key.removeprefix(_PREFIX): value for key, value in state_dict.items()}
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, LoRaDConfig):
        raise ValueError(f"{type(model).__name__} has no LoRaD adapter {adapter_name!r} to save.")
    own = _adapter_state(model, adapter_name)
    tensors = own if state_dict is None else _adapter_state(model, adapter_name, dict(state_dict))
    missing = own.keys() - tensors.keys()
    if missing:
        raise ValueError(
            f"state_dict lacks {len(missing)} tensors of adapter {adapter_name!r}: {min(missing)}."
        )
    if base_model is not None:
        config = dataclasses.replace(config, base_model_name_or_path=os.fspath(base_model))
    output = Output(folder, "save_adapter", overwrite=overwrite)
    _write(output, config, {key: tensors[key].detach() for key in own})


def _adapter_state(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    # by default PEFT looks on the hub whether the base's vocabulary grew; LoRaD turns no embeddings
    return get_peft_model_state_dict(model, state_dict, adapter_name, save_embedding_layers=False)


def _write(output: Output, config: LoRaDConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    config = copy.copy(config)
    config.inference_mode = True
    # sets are sorted, so that the same adapter gives the same file
    for field in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, field), set):
            setattr(config, field, sorted(getattr(config, field)))

    with output.writing() as folder:
        prefixed = {_PREFIX + key: tensor for key, tensor in tensors.items()}
        save_tensors(folder / SAFETENSORS_WEIGHTS_NAME, prefixed, {"format": "pt"})
        config.save_pretrained(os.fspath(folder))


def load_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> nn.Module:
    """Add the adapter in `folder` to `model` and make it the active one.

    As with `PeftModel.from_pretrained`, the adapter is held in float32 at least, whatever the model's dtype,
    and is not trainable if its configuration says `inference_mode`, as saved ones do.

    Args:
        model: a module that is not inside a `PeftModel` (which has its own `load_adapter`).
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: a name that is still free.

    Returns:
        `model` itself.

    Raises:
        ValueError: a file is missing or unreadable, or is not a LoRaD adapter for exactly this model; the
            message names the file. The model then has no adapter of that name.
    """
    config_file, weights_file = Path(folder, CONFIG_NAME), Path(folder, SAFETENSORS_WEIGHTS_NAME)
    config, tensors = _read_config(config_file), _read_tensors(weights_file)
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(
            f"{type(model).__name__} already has an adapter {adapter_name!r}; choose another name."
        )
    try:
        inject_adapter_in_model(config, model, adapter_name)
    except (TypeError, ValueError) as error:
        _remove_adapter(model, adapter_name)
        reason = " ".join(str(error).split())  # some of PEFT's messages print whole modules
        raise ValueError(f"{config_file}: does not fit {type(model).__name__}: {reason}") from error

    problem = _mismatch(_adapter_state(model, adapter_name), tensors)
    if problem:
        _remove_adapter(model, adapter_name)
        raise ValueError(f"{weights_file}: does not fit {type(model).__name__}: {problem}")
    cast_adapter_dtype(model, adapter_name)
    set_peft_model_state_dict(model, tensors, adapter_name)
    set_adapter(model, adapter_name, inference_mode=config.inference_mode)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True  # the adapter methods of diffusers' models ask for it
    return model


def copy_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Copy the angles of the adapter in `folder` to an adapter that `model` already has.

    If the ranks differ, the nearest angles in the sense of least squares are taken (`fit_rank`). Layers that
    the folder's adapter lacks are not changed.

    Args:
        model: a module with LoRaD on at least the same layers, not inside a `PeftModel`.
        folder: holds `adapter_model.safetensors`.
        adapter_name: name of the adapter of `model`.

    Raises:
        ValueError: the file is missing or unreadable, or does not fit. Then `model` is unchanged.
    """
    file = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    own, found = _adapter_state(model, adapter_name), _read_tensors(file)
    tensors = {}
    for key_A in [key for key in found if key.endswith(".lorad_A")]:
        key_B = f"{key_A.removesuffix('A')}B"
        if {key_A, key_B} <= own.keys() and key_B in found:
            fitted = fit_rank((found[key_A], found[key_B]), (own[key_A], own[key_B]))
            tensors |= dict(zip((key_A, key_B), fitted, strict=True))
    expected = {key: own[key] for key in own if key in found or _partner(key) in found}
    if problem := _mismatch(expected or own, found | tensors):
        raise ValueError(f"{file}: does not fit the adapter: {problem}")
    set_peft_model_state_dict(model, own | tensors, adapter_name)


def _partner(key: str) -> str:
    """The key of the other factor of the same layer."""
    return key[:-1] + {"A": "B", "B": "A"}.get(key[-1], key[-1])


def fit_rank(
    found: tuple[torch.Tensor, torch.Tensor], own: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the rank of `own` whose angles are those of `found`, as nearly as that rank allows.

    For a lower rank, Theta = A B (out, in/2) loses its smallest singular values (Eckart and Young). For a
    higher rank, the new directions keep B of `own` and have A = 0. The rows of B keep their mean length.

    Args:
        found, own: A (out, r) and B (r, in/2), each with its own rank r. If the ranks are equal, or the
            shapes belong to different layers, `found` is returned unchanged.
    """
    A, B = found
    r, r_own = B.shape[0], own[1].shape[0]
    same_layer = A.shape[0] == own[0].shape[0] and B.shape[1] == own[1].shape[1] and A.shape[1] == r
    if r == r_own or not same_layer:
        return found
    U, S, V = torch.linalg.svd(A.double() @ B.double(), full_matrices=False)
    kept, length = min(r, r_own, len(S)), B.double().norm(dim=1).mean().clamp_min(1e-12)
    new_A, new_B = torch.zeros_like(own[0]), own[1].clone()
    new_A[:, :kept] = (U[:, :kept] * S[:kept] / length).to(new_A)
    new_B[:kept] = (length * V[:kept]).to(new_B)
    return new_A, new_B


def average_adapters(
    folders: Sequence[str | os.PathLike],
    out_folder: str | os.PathLike,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write the mean of several adapters' factors, computed in float64 (model soups, arXiv 2203.05482).

    A and B are averaged separately, like the average of weights along a training. This is the mean of the
    angles only to first order. So all adapters should have been trained further from the same adapter.

    Args:
        folders: folders of LoRaD adapters with the same layers and ranks. The first one's configuration is
            kept.
        out_folder: new or empty.
        weights: one number for each adapter, zero or more; they are divided by their sum. ``None``: all
            equal.
        dtype: dtype of the written factors; that of the first adapter when ``None``.
        overwrite: replace the folder if this function wrote it and nothing else is in it.

    Raises:
        ValueError: fewer than two adapters, weights that do not fit, a file that is missing or unreadable, or
            adapters that differ in their layers or shapes; the message names the file.
        WadiError: `out_folder` may not or cannot be written; see `wadi.outputs`.
    """
    output = Output(out_folder, "average_adapters", inputs=folders, overwrite=overwrite)
    output.check()
    weights = [1.0] * len(folders) if weights is None else list(weights)
    if len(folders) < 2 or len(weights) != len(folders):
        raise ValueError(
            f"{len(folders)} adapters and {len(weights)} weights; give two or more, one for each"
        )
    if not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise ValueError(f"weights {weights}: must be zero or more, and not all zero")
    config, *_ = [_read_config(Path(folder, CONFIG_NAME)) for folder in folders]
    files = [Path(folder, SAFETENSORS_WEIGHTS_NAME) for folder in folders]
    first, *others = adapters = [_read_tensors(file) for file in files]
    for file, tensors in zip(files[1:], others, strict=True):
        if problem := _mismatch(first, tensors):
            raise ValueError(f"{file}: does not go with {files[0]}: {problem}")
    shares = [weight / sum(weights) for weight in weights]
    mean = {
        key: sum(share * adapter[key].double() for share, adapter in zip(shares, adapters, strict=True))
        for key in first
    }
    _write(output, config, {key: mean[key].to(dtype or first[key].dtype) for key in first})


def _read_config(file: Path) -> LoRaDConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot read the adapter's configuration: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "LORAD":
        raise ValueError(f"{file}: peft_type is {kind!r}, not 'LORAD'")
    try:
        return LoRaDConfig.from_peft_type(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a LoRaD configuration: {error}") from error


def check_finite(file: str | os.PathLike) -> None:
    """Raise if a tensor of an adapter file has a number that is not finite, which would spoil its layer.

    Raises:
        ValueError: there is such a tensor, or the file is missing or unreadable; the message names the file.
    """
    broken = {}
    with _explained(Path(file)), safe_open(file, "pt") as opened:
        keys = list(opened.keys())
        for key in keys:
            # in float32, because float8 knows no isfinite
            if count := int((~torch.isfinite(opened.get_tensor(key).float())).sum()):
                broken[key] = count
    if broken:
        key = min(broken)
        raise ValueError(
            f"{file}: {len(broken)} of {len(keys)} tensors hold numbers that are not finite, such as {key} "
            f"({broken[key]} of its numbers); train the adapter again, or name another"
        )


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    check_finite(file)
    with _explained(file):
        return {key.removeprefix(_PREFIX): tensor for key, tensor in load_file(file).items()}


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file}: cannot read the adapter's weights: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error


def _mismatch(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str | None:
    """Say in one line why `found` is not exactly the tensors that `expected` names, or None if it is."""
    if missing := expected.keys() - found.keys():
        return f"{len(missing)} of {len(expected)} tensors are missing, such as {min(missing)}"
    if unexpected := found.keys() - expected.keys():
        return f"{len(unexpected)} of {len(found)} tensors have no layer, such as {min(unexpected)}"
    for key, tensor in expected.items():
        if tensor.shape != found[key].shape:
            return f"{key} has shape {tuple(found[key].shape)}, not {tuple(tensor.shape)}"
    return None


def _remove_adapter(model: nn.Module, adapter_name: str) -> None:
    for module in model.modules():
        if isinstance(module, LoRaDLayer):
            module.delete_adapter(adapter_name)
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
