"""Fuse a LoRA into the networks of a pipeline folder, with diffusers' own loader."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from torch import nn

from wadi.errors import WadiError
from wadi.files import read_json
from wadi.lorad.io import check_finite
from wadi.onestep.loading import load_pipeline
from wadi.onestep.supported import networks
from wadi.teachers.kinds import read_lora_header

ADAPTER = "teacher"
"""Name of the adapter while it is fused."""

_MATRIX = re.compile(r"(\.processor)?[._]lora([._].*)?$|\.lora_linear_layer\..*$")
"""The end of a LoRA's name: what comes before it is the name of a layer."""


def fused_parts(folder: Path, lora: Path, scale: float) -> dict[str, nn.Module]:
    """Load the networks of a pipeline folder that a LoRA changes, in float32, and fuse the LoRA into them.

    Args:
        folder: a pipeline folder.
        lora: safetensors, with the names of diffusers or of kohya's scripts.
        scale: what the LoRA's change is multiplied by.

    Returns:
        The changed networks, by the names of their parts, without adapters.

    Raises:
        WadiError: the file is no LoRA, diffusers has no LoRA loader for this pipeline, or the LoRA has
            weights that do not fit; the message says how many and which.
    """
    count = sum(len(entry.shape) > 1 for entry in read_lora_header(lora).values())
    try:
        check_finite(lora)
    except ValueError as error:
        raise WadiError(str(error)) from error
    index = read_json(folder / "model_index.json")
    kind = getattr(diffusers, index["_class_name"])
    names = [name for name in getattr(kind, "_lora_loadable_modules", ()) if index.get(name, [None])[0]]
    if not names:
        raise WadiError(
            f"{lora}: diffusers cannot load a LoRA into a {kind.__name__}; merge it into the model with the "
            "program that made it, and name the merged folder with --teacher"
        )
    others = [name for name in networks(folder, index) if name not in names]
    pipeline = load_pipeline(folder, torch.float32, without=others)
    with _silent():
        matrices = _matrices(pipeline, lora)
        _load(pipeline, lora)
    changed = {name: getattr(pipeline, name) for name in names if _loaded(getattr(pipeline, name))}
    _check_fit(matrices, count, changed, lora)
    pipeline.fuse_lora(components=list(changed), lora_scale=scale, safe_fusing=True)
    pipeline.unload_lora_weights()
    return {name: getattr(pipeline, name) for name in changed}


def _matrices(pipeline: DiffusionPipeline, lora: Path) -> list[str]:
    """Names of a LoRA's matrices, as diffusers converts them: part, layer, and which of two matrices."""
    # as the loaders themselves call it
    options = (
        {"unet_config": pipeline.unet.config}
        if isinstance(pipeline, StableDiffusionXLLoraLoaderMixin)
        else {}
    )
    try:
        converted = pipeline.lora_state_dict(str(lora.parent), weight_name=lora.name, **options)
    except Exception as error:  # names that diffusers does not know fail in many ways
        raise WadiError(_unknown(lora, error)) from error
    state = converted[0] if isinstance(converted, tuple) else converted
    return [name for name, tensor in state.items() if tensor.ndim > 1]


def _load(pipeline: DiffusionPipeline, lora: Path) -> None:
    """Load from the file, because its header may hold the alpha of the LoRA."""
    try:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name=ADAPTER)
    except Exception as error:  # weights of another model fail in many ways
        raise WadiError(_unknown(lora, error)) from error


def _unknown(lora: Path, error: Exception) -> str:
    # torch and diffusers name the weights in the lines after the first
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = (
        " ".join(lines[:2])
        if isinstance(error, (ValueError, RuntimeError))
        else "diffusers knows no such names"
    )
    return (
        f"{lora}: does not fit the teacher: {reason[:300]}; name a LoRA that was made for this kind of model"
    )


def _loaded(module: nn.Module) -> list[str]:
    """Names of the LoRA's matrices in a network."""
    return [
        name
        for name, parameter in module.named_parameters()
        if f".{ADAPTER}." in name and "lora_" in name and parameter.ndim > 1
    ]


def _check_fit(matrices: list[str], count: int, changed: dict[str, nn.Module], lora: Path) -> None:
    """Raise if the networks did not take every matrix of the LoRA; diffusers only logs it."""
    if len(matrices) < count:
        raise WadiError(
            f"{lora}: diffusers knows only {len(matrices)} of its {count} matrices; name a LoRA with the "
            "names of diffusers or of kohya's scripts"
        )
    wrong = []
    for part in {name.partition(".")[0] for name in matrices}:
        own = [name for name in matrices if name.startswith(f"{part}.")]
        if part not in changed:
            wrong += own
        elif len(own) != len(_loaded(changed[part])):
            layers = {name.removeprefix("text_model.") for name, _ in changed[part].named_modules()}
            absent = [name for name in own if _layer(name, part) not in layers]
            wrong += absent or own
    if wrong:
        raise WadiError(
            f"{lora}: {len(wrong)} of its {len(matrices)} matrices have no place in the teacher, such as "
            f"{sorted(wrong)[0]}; name a LoRA that was made for this kind of model"
        )


def _layer(name: str, part: str) -> str:
    return _MATRIX.sub("", name.removeprefix(f"{part}.")).removeprefix("text_model.")


@contextmanager
def _silent() -> Iterator[None]:
    """Hide what diffusers and PEFT log about weights that do not fit; `_check_fit` tells it."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
