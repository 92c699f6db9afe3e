"""Write pipelines as folders of stock classes, and copy the files of unchanged parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from wadi.files import load_tensors, read_json, save_tensors, write_json
from wadi.onestep.components import (
    HARMLESS,
    STEMS,
    Entry,
    WeightFiles,
    find_weights,
    name_in_module,
    quiet,
    read_tensor,
)

_WEIGHTS = ("*.safetensors*", "*.bin", "*.bin.index*", "*.msgpack", "*.onnx*", "*.h5", "*.ckpt", "*.pt")


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, max_shard_size: str | None = None) -> None:
    """Write a pipeline into an existing, empty folder. Stock diffusers loads it.

    A part that is unchanged since `load_pipeline` read it is copied file by file, so that programs of other
    versions read it too. Files of a variant get the plain names. In a changed part the weights keep the names
    that they had in the old file. The path of the teacher is not written.

    Args:
        pipeline: to write.
        folder: existing and empty.
        max_shard_size: of the weight files of changed parts, such as "5GB"; ``None`` for that of the library.
    """
    source = Path(getattr(pipeline, "name_or_path", None) or ".")
    for name, part in pipeline.components.items():
        if part is None:
            continue
        if isinstance(part, torch.nn.Module):
            _save_module(part, source / name, folder / name, max_shard_size)
        elif isinstance(part, PreTrainedTokenizerBase):
            _save_tokenizer(part, source / name, folder / name)
        else:
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)
    forget_origin(folder)


def copy_part(source: Path, folder: Path) -> None:
    """Copy a part of a pipeline folder. Only safetensors weights are copied, with plain names."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_WEIGHTS))
    for library in STEMS:
        if (weights := find_weights(source, library)) is not None:
            _copy_weights(weights, folder)


def forget_origin(folder: Path) -> None:
    """Remove the teacher's path on this machine from the configs that diffusers wrote."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_weights(weights: WeightFiles, folder: Path) -> None:
    infix = "" if weights.variant is None else f".{weights.variant}"
    for file in weights.files:
        shutil.copyfile(file, folder / file.name.replace(infix, "", 1))
    if weights.index is not None:
        text = weights.index.read_text(encoding="utf-8")
        index = json.loads(text)
        index["weight_map"] = {key: name.replace(infix, "", 1) for key, name in index["weight_map"].items()}
        write_json(folder / weights.index.name.replace(infix, "", 1), index)


def _save_module(module: torch.nn.Module, source: Path, folder: Path, max_shard_size: str | None) -> None:
    library = type(module).__module__.partition(".")[0]
    weights = find_weights(source, library) if library in STEMS else None
    names = {} if weights is None else _names(weights.entries, module.state_dict())
    if weights is not None and names and _unchanged(weights, names, module.state_dict()):
        copy_part(source, folder)
        return
    sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    module.save_pretrained(folder, safe_serialization=True, **sizes)
    theirs = {name: key for key, name in names.items() if key != name}
    written = find_weights(folder, library)
    if theirs and written is not None and written.index is None:
        tensors = load_tensors(written.files[0])
        renamed = {theirs.get(name, name): tensor for name, tensor in tensors.items()}
        save_tensors(written.files[0], renamed, {"format": "pt"})


def _names(entries: Mapping[str, Entry], state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The module's name for each key of a file, or nothing if the file is for another module."""
    names = {}
    for key in entries:
        name = name_in_module(key, state)
        if name is not None:
            names[key] = name
        elif not HARMLESS.search(key):
            return {}
    return names


def _unchanged(weights: WeightFiles, names: dict[str, str], state: Mapping[str, torch.Tensor]) -> bool:
    for key, name in names.items():
        entry, tensor = weights.entries[key], state[name]
        if entry.shape != tuple(tensor.shape):
            return False
        file = read_tensor(entry)
        if file.dtype != tensor.dtype or not torch.equal(file, tensor.cpu()):
            return False
    return True


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path) -> None:
    """Write a tokenizer; its old files are copied if it knows the same words. Only its limit may change."""
    if not source.is_dir():
        tokenizer.save_pretrained(folder)
        return
    with quiet():
        old = type(tokenizer).from_pretrained(source)
    if old.get_vocab() != tokenizer.get_vocab():
        tokenizer.save_pretrained(folder)
        return
    copy_part(source, folder)
    if old.model_max_length != tokenizer.model_max_length:
        file = folder / "tokenizer_config.json"
        config: dict[str, Any] = read_json(file) if file.exists() else {}
        write_json(file, {**config, "model_max_length": tokenizer.model_max_length})
