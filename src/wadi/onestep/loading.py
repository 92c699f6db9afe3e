"""Pipelines and their parts, read from a folder or from the hub."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, LCMScheduler, PixArtAlphaPipeline
from safetensors import SafetensorError

from wadi.errors import WadiError
from wadi.files import read_json

PIXART_TOKENS = 120
"""`max_sequence_length` of `PixArtAlphaPipeline`: what it pads and cuts to."""


def load_pipeline(
    pretrained_model_name_or_path: str | os.PathLike,
    torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    without: Sequence[str] = (),
) -> DiffusionPipeline:
    """Load a diffusers pipeline from a folder or the hub, all modules in one dtype, safetensors only.

    Args:
        pretrained_model_name_or_path: folder or hub id.
        torch_dtype: float32 when ``None`` (diffusers' own default mixes dtypes if files hold half precision).
            A dict gives each module its own, by name and "default".
        without: modules that are not loaded; names that the pipeline does not have are ignored.

    Raises:
        WadiError: there is no such folder or hub id, a sub-folder is missing, or a file is unreadable.
    """
    name = os.fspath(pretrained_model_name_or_path)
    left_out: dict[str, None] = {}
    if without:
        name = os.fspath(pipeline_folder(name))
        index = read_json(Path(name) / "model_index.json")
        left_out = {module: None for module in without if module in index}
    elif Path(name).exists():
        _check_pipeline_folder(Path(name))
    else:
        check_hub_id(name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            return DiffusionPipeline.from_pretrained(
                name, torch_dtype=torch_dtype or torch.float32, use_safetensors=True, **left_out
            )
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise WadiError(f"{name}: could not load the pipeline: {first_line(error)}") from error


def load_denoiser(pretrained_model_name_or_path: str | os.PathLike) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Load the U-Net or transformer of a diffusers pipeline alone, in float32, safetensors only.

    Args:
        pretrained_model_name_or_path: folder or hub id.

    Returns:
        The network, on the CPU, and the configuration of the pipeline's scheduler.

    Raises:
        WadiError: there is no such folder or hub id, it has neither network, or a file is unreadable.
    """
    name = os.fspath(pretrained_model_name_or_path)
    if Path(name).exists():
        _check_pipeline_folder(Path(name))
    else:
        check_hub_id(name)
    try:
        index = DiffusionPipeline.load_config(name)
        part = "unet" if "unet" in index else "transformer"
        kind = getattr(diffusers, str(index.get(part, [None, None])[1]), None)
        if kind is None:
            raise WadiError(f"{name}: has neither a U-Net nor a transformer of diffusers")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            network = kind.from_pretrained(
                name, subfolder=part, torch_dtype=torch.float32, use_safetensors=True
            )
        return network.eval(), LCMScheduler.load_config(name, subfolder="scheduler")
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise WadiError(f"{name}: could not load the network: {first_line(error)}") from error


def pipeline_folder(name_or_path: str | os.PathLike) -> Path:
    """Folder of a pipeline: `name_or_path` itself, or a hub id's in the hub's cache, downloaded if need be.

    Raises:
        WadiError: no such folder or hub id, not a pipeline folder, or a missing sub-folder.
    """
    name = os.fspath(name_or_path)
    folder = Path(name)
    if not folder.exists():
        check_hub_id(name)
        try:
            folder = Path(DiffusionPipeline.download(name, use_safetensors=True))
        except Exception as error:  # every kind of failure of the hub
            raise WadiError(f"{name}: could not load the pipeline: {first_line(error)}") from error
    _check_pipeline_folder(folder)
    return folder


def pipeline_class_name(folder: Path) -> str:
    """Class of the pipeline in a folder, as its model_index.json has it."""
    return str(read_json(folder / "model_index.json").get("_class_name"))


def prompt_limit(pipeline: DiffusionPipeline) -> int:
    """Most tokens of a prompt: the tokenizer's, and for PixArt-alpha never more than its 120."""
    limit = pipeline.tokenizer.model_max_length
    return min(limit, PIXART_TOKENS) if isinstance(pipeline, PixArtAlphaPipeline) else limit


def stock_arguments(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Arguments of a call that make a stock pipeline draw the size that it is asked for."""
    return {"use_resolution_binning": False} if isinstance(pipeline, PixArtAlphaPipeline) else {}


def load_vae(name: str, pipeline: DiffusionPipeline, torch_dtype: torch.dtype) -> torch.nn.Module:
    """Load another autoencoder for a pipeline, as `AutoencoderTiny` ("madebyollin/taesd").

    Its own scaling factor says how latents are scaled before it decodes them, as in diffusers' pipelines.

    Args:
        name: folder or hub id of an `AutoencoderTiny` or `AutoencoderKL`.
        pipeline: whose latents it is to decode.
        torch_dtype: of its weights.

    Raises:
        WadiError: it cannot be loaded, is of another class, or its latents have another shape.
    """
    if not Path(name).is_dir():
        check_hub_id(name)
    classes = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}
    try:
        kind = AutoencoderTiny.load_config(name).get("_class_name")
        if kind not in classes:
            raise WadiError(f"--vae {name}: is {kind}; use {' or '.join(classes)}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            vae, info = classes[kind].from_pretrained(
                name, torch_dtype=torch_dtype, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WadiError(f"--vae {name}: could not load the autoencoder: {first_line(error)}") from error
    if missing := info["missing_keys"]:  # diffusers only warns
        raise WadiError(f"--vae {name}: {len(missing)} weights are missing, as {min(missing)}; load it again")
    for what, own, other in (
        ("latent channels", pipeline.vae.config.latent_channels, vae.config.latent_channels),
        ("pixels a latent", pipeline.vae_scale_factor, 2 ** (len(vae.config.block_out_channels) - 1)),
    ):
        if own != other:
            raise WadiError(f"--vae {name}: has {other} {what} and the model needs {own}; name another")
    return vae.eval()


def forget_origin(folder: Path) -> None:
    """Remove the teacher's path on this machine from the configs that diffusers wrote."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_pipeline_folder(folder: Path) -> None:
    index = read_json(folder / "model_index.json") if folder.is_dir() else None
    if not isinstance(index, dict):
        raise WadiError(f"{folder}: not a diffusers pipeline folder; name one with a model_index.json")
    for name, value in index.items():
        wanted = isinstance(value, list) and len(value) == 2 and value[0] is not None
        if wanted and not (folder / name).is_dir():
            raise WadiError(f"{folder}: its model_index.json lists {name!r}, but the sub-folder is missing")


def check_hub_id(name: str) -> None:
    """Raise a WadiError if `name`, which is no folder, does not have the form of a hub id either."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise WadiError(f"{name}: no such folder, and not a hub id of the form owner/name")


def first_line(error: Exception) -> str:
    """First line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
