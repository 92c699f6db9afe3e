"""Adapters of a student and of subjects: found, read and merged into a pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError

from wadi.errors import WadiError
from wadi.files import load_tensors, read_json, write_json
from wadi.onestep.components import first_line
from wadi.onestep.loading import check_hub_id, run_part

ONE_STEP_FILE = "one_step.json"
TEXT_ENCODER_FOLDER = "text_encoder"
"""Of an adapter folder: the adapter of the text encoder, where it has one."""
Adapters = str | os.PathLike | Sequence[str | os.PathLike] | None
"""No adapter, one, or several: folders or hub ids."""


def merge_adapters(pipeline: DiffusionPipeline, adapters: Adapters) -> None:
    """Merge PEFT adapters into a pipeline's U-Net or transformer, and text encoder where one has that too.

    They are merged one after the other, each into what the ones before left. Of LoRaD adapters the order does
    not matter, because angles add; of others it does.

    Args:
        pipeline: a stock pipeline; its modules are changed in place.
        adapters: folder or hub id, or several.

    Raises:
        WadiError: no such adapter, or it does not fit the pipeline.
    """
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    for folder in [adapter_folder(one) for one in as_list(adapters)]:
        setattr(pipeline, name, _merge(getattr(pipeline, name), folder))
        if (folder / TEXT_ENCODER_FOLDER).is_dir():
            part = adapter_folder(folder / TEXT_ENCODER_FOLDER)
            pipeline.text_encoder = _merge(pipeline.text_encoder, part)


def as_list(adapters: Adapters) -> list[str | os.PathLike]:
    """Names of adapters, none, one or several, as a list."""
    if adapters is None:
        return []
    return [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)


def adapter_folder(adapter: str | os.PathLike) -> Path:
    """Folder of a PEFT adapter: itself, or a hub id's in the hub's cache, downloaded if need be.

    Raises:
        WadiError: no such folder or hub id, or one of its two files is missing.
    """
    folder = Path(adapter)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        check_hub_id(os.fspath(adapter))
        try:
            folder = Path(snapshot_download(os.fspath(adapter), allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:
            raise WadiError(f"{adapter}: could not fetch the adapter: {first_line(error)}") from error
    folder = run_part(folder, "adapter", "adapter_config.json")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise WadiError(f"{folder}: not a PEFT adapter folder, {file} is missing")
    return folder


def write_alpha_T_squared(folder: str | os.PathLike, alpha_T_squared: float) -> None:
    """Keep a student's alpha_T^2 beside its adapter, in `one_step.json`."""
    write_json(Path(folder) / ONE_STEP_FILE, {"alpha_T_squared": alpha_T_squared})


def read_alpha_T_squared(folder: str | os.PathLike) -> float | None:
    """Read what `write_alpha_T_squared` wrote; ``None`` (the schedule's own) where there is no such file."""
    path = Path(folder) / ONE_STEP_FILE
    if not path.exists():
        return None
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("alpha_T_squared"), float):
        raise WadiError(f'{path}: not of the form {{"alpha_T_squared": 0.0047}}; write it again or delete it')
    return value["alpha_T_squared"]


def _merge(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise WadiError(f"{folder}: the adapter does not fit the model: {first_line(error)}") from error
    # PEFT only warns about weights that the file lacks
    wrong = (
        get_peft_model_state_dict(adapted).keys() ^ load_tensors(folder / "adapter_model.safetensors").keys()
    )
    if wrong:
        raise WadiError(
            f"{folder}: the adapter does not fit the model: {len(wrong)} weights differ, as {min(wrong)}"
        )
    return adapted.merge_and_unload()
