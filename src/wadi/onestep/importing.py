"""Convert a file of weights that the authors of WaDi published to a folder that diffusers or PEFT loads.

A file holds a whole network, with the keys of diffusers' `UNet2DConditionModel` or `PixArtTransformer2DModel`
(before diffusers 0.26 `Transformer2DModel`, with the same keys), or the angles that the authors' training
script saves, ``<layer>.theta_a`` (out, r) and ``<layer>.theta_b`` (r, in // 2). No published file was
available for a test. Names and shapes are checked. That the angles turn pairs of columns as in the paper's
equations is an assumption.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import nn

from wadi.errors import WadiError
from wadi.files import load_tensors
from wadi.lorad import LoRaDConfig, save_adapter
from wadi.onestep.loading import load_denoiser, load_pipeline
from wadi.onestep.pipeline import StudentPipeline
from wadi.onestep.scheduler import student_scheduler
from wadi.onestep.student import Student, check_teacher, network_of
from wadi.outputs import Output
from wadi.torch_files import read_torch_file

RELEASED_ALPHA_T_SQUARED = 0.0047
"""alpha_T^2 of the published students. PixArt's have it too, although PixArt's own schedule has 4.04e-5."""

UNET, PIXART, ANGLES = "UNet2DConditionModel", "PixArtTransformer2DModel", "angles of an adapter"

_PREFIXES = ("module.", "_orig_mod.", "unet.", "transformer.")  # DDP, torch.compile, the part of a pipeline
_OBSOLETE = ("caption_projection.y_embedding",)  # saved until diffusers 0.24, used by no forward
_ANGLE_NAMES = {"theta_a": "lorad_A", "theta_b": "lorad_B"}
_NAMED = 3  # number of keys that a message names


@dataclass(frozen=True)
class Released:
    """The content of a file of weights.

    Attributes:
        kind: `UNET`, `PIXART` or `ANGLES`.
        tensors: the tensors by diffusers' key, without a prefix.
        ignored: names of other entries of the file: obsolete weights, or entries beside the state dict.
    """

    kind: str
    tensors: dict[str, torch.Tensor]
    ignored: tuple[str, ...] = ()


def import_weights(
    weights: str | os.PathLike,
    model: str | os.PathLike,
    out_folder: str | os.PathLike,
    alpha_T_squared: float | None = RELEASED_ALPHA_T_SQUARED,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Released:
    """Write published weights as a folder, or nothing on failure. Every key and every shape is checked.

    A whole network becomes a merged pipeline as `export_pipeline` writes it. Angles become an adapter folder
    for `StudentPipeline.from_pretrained` or `wadi generate --adapter`.

    Args:
        weights: a safetensors file, or a file of `torch.save`, which is read without unpickling it.
        model: folder or hub id of the base model's pipeline; its other parts are written unchanged.
        out_folder: where to write; new or empty.
        alpha_T_squared: alpha_T^2 of the student; ``None`` keeps that of the base model's schedule.
        dtype: dtype of a pipeline's written weights; float32 when ``None``.
        overwrite: replace the folder if the same function wrote it and nothing else is in it.

    Returns:
        The content of the file.

    Raises:
        WadiError: a file cannot be read, the weights are not finite or do not fit the base model's network,
            or the folder may not or cannot be written.
    """
    output = Output(out_folder, "import", inputs=(weights, model), overwrite=overwrite)
    output.check()
    released = read_released(weights)
    if released.kind == ANGLES:
        _import_angles(released, weights, model, output, alpha_T_squared)
        return released
    pipeline = load_pipeline(model, dtype)
    network = network_of(pipeline)
    check_teacher(model, pipeline.scheduler, network)
    _check_kind(released, weights, network, model)
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    _check_keys(released.tensors, expected, weights, f"the {released.kind} of {model}")
    network.load_state_dict(released.tensors)
    _check_finite(network.state_dict(), weights, f" in {network.dtype}")
    StudentPipeline(pipeline, alpha_T_squared).write(output)
    return released


def read_released(path: str | os.PathLike) -> Released:
    """Read a file of weights, and remove prefixes and wrappers.

    Raises:
        WadiError: the file cannot be read, holds anything except finite floating-point tensors, or its keys
            are not those of a U-Net, of PixArt or of angles.
    """
    state, beside = _read(Path(path))
    state = without_prefixes(state)
    obsolete = [key for key in _OBSOLETE if state.pop(key, None) is not None]
    if wrong := [
        key for key, value in state.items() if not torch.is_tensor(value) or not value.is_floating_point()
    ]:
        raise WadiError(
            f"{path}: has entries that are not floating-point tensors ({_some(wrong)}); name another file"
        )
    kind = _kind(state)
    if kind is None:
        raise WadiError(
            f"{path}: the keys ({_some(state)}) are not those of diffusers' {UNET} or {PIXART}, nor of "
            "angles (theta_a, theta_b); name a state dict in the format of diffusers"
        )
    _check_finite(state, path)
    return Released(kind, state, (*beside, *obsolete))


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the state dict, and the names of the entries beside it."""
    if path.is_dir():
        raise WadiError(f"{path}: is a folder; name the file of weights")
    return (load_tensors(path), []) if path.suffix == ".safetensors" else read_torch_file(path)


def without_prefixes(state: dict[str, Any]) -> dict[str, Any]:
    """Remove prefixes that all keys have: from DDP, from torch.compile, or the name of a pipeline's part."""
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _kind(keys: Iterable[str]) -> str | None:
    keys = set(keys)
    if any(key.endswith(tuple(f".{name}" for name in _ANGLE_NAMES)) for key in keys):
        return ANGLES
    firsts = {key.split(".")[0] for key in keys}
    if {"conv_in", "down_blocks", "up_blocks"} <= firsts:
        return UNET
    if {"pos_embed", "transformer_blocks", "adaln_single"} <= firsts:
        return PIXART
    return None


def _check_kind(
    released: Released, weights: str | os.PathLike, network: nn.Module, model: str | os.PathLike
) -> None:
    if type(network).__name__ != released.kind:
        raise WadiError(
            f"{weights}: holds a {released.kind}, but {model} has a {type(network).__name__}; "
            "name the base model that the student was distilled from"
        )


def _check_keys(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Size],
    weights: str | os.PathLike,
    whose: str,
) -> None:
    """Raise unless keys and shapes are the same on both sides; the message lists all differences."""
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    reshaped = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    problems = [f"{len(keys)} keys {problem} ({_some(keys)})" for problem, keys in groups.items() if keys]
    if problems:
        raise WadiError(
            f"{weights}: does not fit {whose}: {'; '.join(problems)}; "
            "name the base model that the student was distilled from"
        )


def _check_finite(tensors: Mapping[str, torch.Tensor], weights: str | os.PathLike, where: str = "") -> None:
    if broken := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise WadiError(
            f"{weights}: {len(broken)} weights are not finite{where} ({_some(broken)}); fetch the file again"
        )


def _import_angles(
    released: Released,
    weights: str | os.PathLike,
    model: str | os.PathLike,
    output: Output,
    alpha_T_squared: float | None,
) -> None:
    network, scheduler = load_denoiser(model)
    check_teacher(model, scheduler, network)
    modules = dict(network.named_modules())
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in released.tensors))
    layers = {name: modules[name] for name in names if isinstance(modules.get(name), (nn.Linear, nn.Conv2d))}
    fan = {name: layer.weight.flatten(1).shape for name, layer in layers.items()}
    ranks = {name: _rank(released.tensors.get(f"{name}.theta_a")) for name in names}
    expected = {}
    for name, (out_features, fan_in) in fan.items():
        expected[f"{name}.theta_a"] = torch.Size((out_features, ranks[name]))
        expected[f"{name}.theta_b"] = torch.Size((ranks[name], fan_in // 2))
    _check_keys(released.tensors, expected, weights, f"the layers of {model}")
    student_scheduler(scheduler, alpha_T_squared)  # raises if the scheduler or alpha_T^2 is wrong
    r = max(ranks.values())
    config = LoRaDConfig(
        r=r,
        target_modules=names,
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r},
    )
    record = Student.of(network, scheduler, alpha_T_squared)
    inject_adapter_in_model(config, network)
    for name in names:
        layer = network.get_submodule(name)
        for theirs, ours in _ANGLE_NAMES.items():
            parameter = getattr(layer, ours)["default"]
            parameter.data = released.tensors[f"{name}.{theirs}"].to(parameter)
    with output.writing() as folder:
        save_adapter(network, folder, base_model=model)
        record.write(folder)


def _rank(theta_a: torch.Tensor | None) -> int:
    """The rank, but at least 1, so that `_check_keys` reports a tensor of another shape."""
    return max(1, theta_a.shape[1]) if theta_a is not None and theta_a.ndim == 2 else 1


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:_NAMED]) + (", ..." if len(keys) > _NAMED else "")
