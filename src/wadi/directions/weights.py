"""Weights of a network on the disk, of which only one is in memory at a time.

The keys are always those of diffusers' U-Net or transformer, whatever the files are.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

from wadi.errors import WadiError
from wadi.files import read_json
from wadi.onestep.adapters import adapter_folder
from wadi.onestep.components import Entry, find_weights, read_headers, read_tensor
from wadi.onestep.importing import without_prefixes
from wadi.onestep.loading import pipeline_folder, run_part
from wadi.onestep.student import Student
from wadi.onestep.supported import NETWORKS

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER_PREFIX = "base_model.model."
_LDM_PREFIX = "model.diffusion_model."


class Weights:
    """Named tensors in safetensors files.

    A file is opened for every read and closed with its tensor, so that the pages of the file do not fill the
    memory.

    Args:
        name: name for messages, as the user gave it.
        entries: where each tensor is, by key of diffusers.
    """

    def __init__(self, name: str, entries: dict[str, Entry]) -> None:
        self.name = name
        self.entries = entries

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by key."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor in float32, or in float64 if the file holds that.

        Raises:
            WadiError: the file cannot be read, or its numbers are quantised or not finite.
        """
        entry = self.entries[key]
        if not entry.dtype.startswith(("F", "BF")):
            raise WadiError(
                f"{entry.file}: {key} is {entry.dtype}, not floating-point; name unquantised weights"
            )
        tensor = _wide(read_tensor(entry))
        if not torch.isfinite(tensor).all():
            raise WadiError(f"{self.name}: {key} is not finite; write the file again or name another")
        return tensor


class AdaptedWeights(Weights):
    """The weights of a base model with a PEFT adapter, which PEFT merges into one layer at a time.

    Args:
        folder: folder with adapter_config.json and adapter_model.safetensors.
        base: weights of the base model, for which the adapter was made.

    Raises:
        WadiError: the adapter cannot be read, or has tensors for which the base model has no layer.
    """

    def __init__(self, folder: Path, base: Weights) -> None:
        super().__init__(str(folder), dict(base.entries))
        self.folder, self.base = folder, base
        self.config = _adapter_config(folder)
        if (student := Student.read(folder)) is not None:
            student.check_base(folder, base.shapes(), base.name)
        self.parts: dict[str, dict[str, Entry]] = {}
        for key, entry in read_headers([folder / ADAPTER_WEIGHTS]).items():
            key = key.removeprefix(_ADAPTER_PREFIX).replace(".base_layer.", ".")
            if key in self.entries:  # a bias or a whole module that was trained with the adapter
                self.entries[key] = entry
            else:
                self.parts.setdefault(self._layer_of(key), {})[key] = entry

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor with the adapter merged.

        Raises:
            WadiError: a file cannot be read, the adapter does not fit, or numbers are not finite.
        """
        tensor = super().read(key)
        layer = key.removesuffix(".weight")
        if layer not in self.parts or layer == key:
            return tensor
        merged = self._merged(layer, tensor)
        if not torch.isfinite(merged).all():
            raise WadiError(f"{self.name}: the adapter of {layer} is not finite; name another")
        return merged

    def _layer_of(self, key: str) -> str:
        layer = key
        while layer := layer.rpartition(".")[0]:
            if f"{layer}.weight" in self.base.entries:
                return layer
        raise WadiError(
            f"{self.folder}: the adapter does not fit {self.base.name}: there is no such layer for {key}; "
            "name the model it was made for with --base"
        )

    def _merged(self, layer: str, weight: torch.Tensor) -> torch.Tensor:
        config = copy.copy(self.config)
        config.target_modules = re.escape(layer)
        config.exclude_modules = config.modules_to_save = None
        config.layers_to_transform = config.layers_pattern = None
        root = _alone(layer, weight)
        tensors = {key: _wide(read_tensor(entry)) for key, entry in self.parts[layer].items()}
        try:
            inject_adapter_in_model(config, root)
            found = set_peft_model_state_dict(root, tensors)
            missing = [key for key in found.missing_keys if ".base_layer." not in key]
            if wrong := [*found.unexpected_keys, *missing]:
                raise ValueError(f"{wrong[0]} is missing or has no place")
            module = root.get_submodule(layer)
            module.merge()
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WadiError(
                f"{self.folder}: the adapter of {layer} cannot be merged into {self.base.name}: {line}; "
                "name the model it was made for with --base"
            ) from error
        return module.get_base_layer().weight.detach()


def open_weights(
    source: str | os.PathLike, base: str | os.PathLike | None = None, other: Weights | None = None
) -> Weights:
    """Find the weights of a network, and read the headers of their files.

    Args:
        source: a pipeline folder of diffusers or its hub id (its U-Net or transformer is read), the folder of
            a network alone, a safetensors file with diffusers' keys, a whole checkpoint of SD 1.x, 2.x or XL
            (with LDM's keys), or the folder of a PEFT adapter.
        base: base model of an adapter; if not given, the one that its adapter_config.json names, or `other`.
        other: base model of an adapter that names none, or names a folder that does not exist here.

    Raises:
        WadiError: there is nothing of these kinds, or a file cannot be read.
    """
    path = source = run_part(Path(source), "pipeline", "model_index.json")
    if path.is_file():
        return Weights(str(source), _file_entries(path))
    if (path / ADAPTER_CONFIG).is_file():
        folder = adapter_folder(path)
        named = base or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        elsewhere = Path(named or "").is_absolute() and not Path(named).exists()
        if base is None and other is not None and elsewhere:
            named = None  # a path on another machine
        if not named and other is None:
            raise WadiError(f"{source}: names no base model; give it with --base")
        return AdaptedWeights(folder, open_weights(named) if named else other)
    if path.is_dir() and not (path / "model_index.json").exists():
        return Weights(str(source), _folder_entries(path))
    return Weights(str(source), _folder_entries(network_folder(pipeline_folder(source))))


def network_folder(pipeline: Path) -> Path:
    """The sub-folder of a pipeline with its U-Net or transformer.

    Raises:
        WadiError: the pipeline has neither.
    """
    for part in NETWORKS:
        if (pipeline / part).is_dir():
            return pipeline / part
    raise WadiError(f"{pipeline}: has neither {' nor '.join(NETWORKS)}; name a text-to-image pipeline")


def check_pair(teacher: Weights, student: Weights) -> None:
    """Check that two networks have tensors of the same keys and shapes; see `check_shapes`."""
    check_shapes(teacher.name, teacher.shapes(), student.name, student.shapes())


def check_shapes(
    teacher: str | os.PathLike,
    before: dict[str, tuple[int, ...]],
    student: str | os.PathLike,
    after: dict[str, tuple[int, ...]],
) -> None:
    """Check that two networks have tensors of the same keys and shapes.

    Args:
        teacher: name of the first network, for the message.
        before: its shapes by key.
        student: name of the second network.
        after: its shapes by key.

    Raises:
        WadiError: the architectures differ.
    """
    if different := sorted(dict(before.items() ^ after.items())):
        key = different[0]
        raise WadiError(
            f"{student}: not of one architecture with {teacher}: {len(different)} weights differ, "
            f"such as {key} ({after.get(key, 'none')}, the teacher has {before.get(key, 'none')}); "
            "name the student's own teacher"
        )


def _folder_entries(folder: Path) -> dict[str, Entry]:
    """Where each tensor of a network's folder is."""
    if (weights := find_weights(folder)) is not None:
        return weights.entries
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if len(found) != 1:
        raise WadiError(
            f"{folder}: neither a pipeline (model_index.json) nor an adapter ({ADAPTER_CONFIG}), and "
            f"holds {len(found)} safetensors files and no {WEIGHTS_NAME}; name one of those, or one file"
        )
    return read_headers(found)


def _file_entries(path: Path) -> dict[str, Entry]:
    """Where each tensor of a file is, whether its keys are diffusers' (with a prefix or not) or LDM's."""
    entries = read_headers([path])
    ldm = [key for key in entries if key.startswith(_LDM_PREFIX)]
    if not ldm:
        return without_prefixes(entries)
    try:
        names = ldm_names(entries)
    except (KeyError, IndexError, AttributeError):
        names = {}
    if unknown := set(ldm) - set(names.values()):
        raise WadiError(
            f"{path}: diffusers' converter has no name for {len(unknown)} weights, such as {min(unknown)}; "
            "name a checkpoint of Stable Diffusion, or the network as diffusers saves it"
        )
    return {key: entries[name] for key, name in names.items()}


def ldm_names(keys: Iterable[str]) -> dict[str, str]:
    """Diffusers' keys and the keys of a whole checkpoint, by diffusers' own converter, which only renames.

    Args:
        keys: keys of the checkpoint; those of an average (`model_ema.`) are ignored.
    """
    keys = list(keys)
    pattern = re.compile(rf"{re.escape(_LDM_PREFIX)}input_blocks\.(\d+)\.0\.op\.weight")
    downsamplers = [int(match.group(1)) for match in map(pattern.fullmatch, keys) if match]
    # the first one follows input_blocks.0, which is conv_in, and the layers of a block, which are two in SD
    config = {"layers_per_block": min(downsamplers, default=3) - 1}
    if f"{_LDM_PREFIX}label_emb.0.0.weight" in keys:
        config["addition_embed_type"] = "text_time"  # SD XL
    return convert_ldm_unet_checkpoint({key: key for key in keys}, config)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(
        torch.promote_types(tensor.dtype, torch.float32) if tensor.itemsize > 1 else torch.float32
    )


def _adapter_config(folder: Path) -> PeftConfig:
    file = folder / ADAPTER_CONFIG
    try:
        return PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise WadiError(f"{file}: not a configuration that PEFT knows ({error}); name another") from error


def _alone(layer: str, weight: torch.Tensor) -> nn.Module:
    """A module that holds one layer at its full name; the shape of its weight tells its kind."""
    out_features, in_features, *kernel = weight.shape
    if kernel:
        module = nn.Conv2d(in_features, out_features, tuple(kernel), bias=False, device="meta")
    else:
        module = nn.Linear(in_features, out_features, bias=False, device="meta")
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    *parents, last = layer.split(".")
    root = node = nn.Module()
    for name in parents:
        node.add_module(name, nn.Module())
        node = node.get_submodule(name)
    node.add_module(last, module)
    return root
