"""Convert a single file in the original layout (as Civitai has them) to the parts of a diffusers folder.

diffusers' own functions rename the weights. Configurations and tokenizers come from a folder of the same kind
of model, and so do the networks that the file lacks. Names and shapes are checked before weights are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    CHECKPOINT_KEY_NAMES,
    LDM_VAE_KEYS,
    convert_sd3_t5_checkpoint_to_diffusers,
    create_diffusers_clip_model_from_ldm,
    fetch_diffusers_config,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from wadi.errors import WadiError
from wadi.files import load_tensors, read_json, save_tensors
from wadi.onestep.components import HARMLESS, STEMS, Entry, empty_module, find_weights, first_line
from wadi.onestep.supported import NETWORKS, networks
from wadi.teachers.kinds import read_model_header

Tensors = dict[str, torch.Tensor]

_PREFIX = "model.diffusion_model."
_UNET = re.compile(r"^(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.")
_OLD_CLIP = re.compile(r"^(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.")
_PART_PREFIXES = ("", _PREFIX, "unet.", "transformer.")
_CLIPS = ("clip", "clip_sdxl", "clip_sd3", "open_clip", "open_clip_sdxl", "open_clip_sd3")
_T5 = "text_encoders.t5xxl.transformer.shared.weight"
_MARKS = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
"""Empty tensors with which SDXL files tell their schedule, and what a scheduler then has."""


def parts_in(file: Path, config: Path) -> dict[str, type[nn.Module]]:
    """Check from the header that a file fits a diffusers folder; return the parts that the file holds.

    Args:
        file: safetensors, in the original layout or with the names of diffusers.
        config: folder of a diffusers pipeline; only its configurations are read.

    Returns:
        The names of the parts whose weights come from the file, and their classes.

    Raises:
        WadiError: the file holds something else than a model, the weights do not fit the configurations, or
            neither the file nor the folder has the weights of a part.
    """
    entries = read_model_header(file)
    index = read_json(config / "model_index.json")
    _check_marks(entries, file, config / "scheduler" / "scheduler_config.json")
    header = _usual({key: torch.empty(entry.shape, device="meta") for key, entry in entries.items()})
    found = {}
    for part, kind in networks(config, index).items():
        if part in NETWORKS or (part == "vae" and any(key.startswith(tuple(LDM_VAE_KEYS)) for key in header)):
            module = _empty(kind, config / part)
            converted = _converted(kind, config / part, header, file, module)
            _check_fit(converted, module, file, config / part, header)
            found[part] = kind
        elif _holds_encoder(kind, config / part, header):
            found[part] = kind
        elif find_weights(config / part, kind.__module__.partition(".")[0]) is None:
            raise WadiError(
                f"{file}: holds no {part}, and {config / part} has no safetensors weights either; name a "
                "complete diffusers folder of the same kind of model with --teacher-config"
            )
    return found


def write_part(part: str, kind: type[nn.Module], file: Path, config: Path, folder: Path) -> None:
    """Write one part of a file as diffusers or transformers saves it, in the dtype of the file.

    Weights of 8 bits are widened to bfloat16, which holds them exactly.

    Args:
        part: name of the part.
        kind: its class.
        file: see `parts_in`, which must have been called.
        config: the diffusers folder.
        folder: an existing folder to write to.

    Raises:
        WadiError: a weight is missing or not finite, or the part cannot be written.
    """
    tensors = _usual(load_tensors(file))
    if part in NETWORKS or part == "vae":
        converted = _converted(kind, config / part, tensors, file, _empty(kind, config / part))
    else:
        converted = _encoder(kind, part, config, tensors, file)
    written = {}
    for name, tensor in converted.items():
        if not tensor.is_floating_point():
            continue  # positions, which are no weights
        tensor = tensor.to(torch.bfloat16) if tensor.itemsize == 1 else tensor
        if tensor.is_meta or not torch.isfinite(tensor).all():
            problem = "is missing" if tensor.is_meta else "is not finite"
            raise WadiError(f"{file}: the weight {name} of its {part} {problem}; fetch the file again")
        written[name] = tensor
    save_tensors(
        folder / f"{STEMS[kind.__module__.partition('.')[0]]}.safetensors", written, {"format": "pt"}
    )


def usual_model(entries: Mapping[str, Entry]) -> str:
    """The hub id of the model that diffusers takes a file's kind from, by names and shapes."""
    header = _usual({key: torch.empty(entry.shape, device="meta") for key, entry in entries.items()})
    return fetch_diffusers_config(header)["pretrained_model_name_or_path"]


def _check_marks(entries: Mapping[str, Entry], file: Path, scheduler: Path) -> None:
    config = read_json(scheduler) if scheduler.is_file() else {}
    for mark, (option, value) in _MARKS.items():
        if mark in entries and config.get(option) != value:
            raise WadiError(
                f"{file}: holds the mark {mark}, but {option} is {config.get(option)!r} in {scheduler}; copy "
                f"the folder, set {option} to {json.dumps(value)} in the copy, and name it with "
                "--teacher-config"
            )


def _usual(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The same tensors with the names that diffusers' converters know."""
    renamed = {}
    for key, tensor in tensors.items():
        name = f"model.{key}" if key.startswith("diffusion_model.") else key
        name = f"{_PREFIX}{name}" if _UNET.match(name) else name
        renamed[_OLD_CLIP.sub(r"\1text_model.\2.", name)] = tensor
    return renamed


def _empty(kind: type[nn.Module], folder: Path) -> nn.Module:
    """The network that a configuration describes, without memory for its weights."""
    try:
        return empty_module(kind, folder)
    except WadiError:
        raise
    except Exception as error:  # a wrong configuration fails in many ways
        raise WadiError(
            f"{folder / 'config.json'}: describes no {kind.__name__}: {first_line(error)}"
        ) from error


def _converted(
    kind: type[nn.Module], folder: Path, tensors: Tensors, file: Path, module: nn.Module
) -> Tensors:
    """The tensors of one network by their names in diffusers; a file may have these names already."""
    wanted = module.state_dict().keys()
    for prefix in _PART_PREFIXES:
        if all(f"{prefix}{name}" in tensors for name in wanted):
            return {name: tensors[f"{prefix}{name}"] for name in wanted}
    known = SINGLE_FILE_LOADABLE_CLASSES.get(kind.__name__)
    if known is None:
        raise WadiError(
            f"{file}: diffusers cannot convert a file of this kind of model ({kind.__name__}); name a "
            "diffusers folder instead"
        )
    convert: Callable[..., Any] = known["checkpoint_mapping_fn"]
    try:
        # a copy, because some converters remove what they have read
        converted = convert(checkpoint=dict(tensors), config=dict(read_json(folder / "config.json")))
    except Exception as error:  # a file of another kind of model fails in many ways
        raise WadiError(_other_kind(file, folder, tensors, f"{type(error).__name__}")) from error
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def _check_fit(converted: Tensors, module: nn.Module, file: Path, folder: Path, header: Tensors) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    groups = {
        "missing": [name for name in wanted if name not in converted],
        "not in the configuration": [
            name for name in converted if name not in wanted and not HARMLESS.search(name)
        ],
        "of another shape": [
            name for name in wanted if name in converted and tuple(converted[name].shape) != wanted[name]
        ],
    }
    wrong = [f"{len(names)} weights {what}, such as {names[0]}" for what, names in groups.items() if names]
    if wrong:
        raise WadiError(_other_kind(file, folder, header, "; ".join(wrong)))


def _other_kind(file: Path, folder: Path, tensors: Tensors, reason: str) -> str:
    return (
        f"{file}: does not fit {folder / 'config.json'} ({reason}); diffusers takes the file for a model "
        f"like {fetch_diffusers_config(tensors)['pretrained_model_name_or_path']}, so name a diffusers "
        "folder of this kind with --teacher-config"
    )


def _holds_encoder(kind: type[nn.Module], folder: Path, header: Tensors) -> bool:
    if issubclass(kind, T5EncoderModel):
        return _T5 in header
    if not issubclass(kind, (CLIPTextModel, CLIPTextModelWithProjection)):
        return False
    width = read_json(folder / "config.json").get("hidden_size")
    names = [CHECKPOINT_KEY_NAMES[name] for name in _CLIPS]
    return any(header[name].shape[-1] == width for name in names if name in header)


def _encoder(kind: type[nn.Module], part: str, config: Path, tensors: Tensors, file: Path) -> Tensors:
    """The tensors of a text encoder by their names in transformers; what the file lacks is on "meta"."""
    try:
        if issubclass(kind, T5EncoderModel):
            return convert_sd3_t5_checkpoint_to_diffusers(tensors)
        module = create_diffusers_clip_model_from_ldm(
            kind, tensors, subfolder=part, config=str(config), local_files_only=True
        )
    except Exception as error:  # another kind of text encoder fails in many ways
        raise WadiError(
            f"{file}: its text encoder does not fit {config / part / 'config.json'}: {first_line(error)}; "
            "name a diffusers folder of the same kind with --teacher-config"
        ) from error
    return module.state_dict()
