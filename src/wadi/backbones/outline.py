"""Backbones without weights, on the meta device: known from the configurations in a folder alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from wadi.backbones import Backbone, backbone_class
from wadi.backbones.condition import MASK, STATES, Condition
from wadi.backbones.sd3 import SD3Backbone
from wadi.backbones.storage import store_base
from wadi.device import Precision
from wadi.errors import WadiError
from wadi.files import read_json
from wadi.onestep.components import first_line
from wadi.onestep.loading import call_default, part_folder, pipeline_folder
from wadi.onestep.supported import networks

META = torch.device("meta")
CONFIGURATIONS = ("*.json", "*/*.json")
"""The files of a pipeline that say what it is."""
_WIDTHS = ("joint_attention_dim", "caption_channels", "cap_feat_dim", "cross_attention_dim")
"""Fields of networks' configurations for the width of the text's states. The first that is there decides."""


class _Unread:
    """A `PromptEncoder` that has read no tokenizer: it knows only its class and its dtypes."""

    def __init__(self, pipeline: DiffusionPipeline, dtype: torch.dtype, *_: object) -> None:
        self.pipeline, self.dtype = pipeline, dtype

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes of the text encoders by name, and "default" for all others."""
        return self._encoder_dtypes


def configuration_folder(name_or_path: str | Path) -> Path:
    """The folder of a pipeline, or its configurations alone from the hub.

    Raises:
        WadiError: there is no such folder or hub id, or wadi cannot use the pipeline; see `pipeline_folder`.
    """
    return pipeline_folder(part_folder(name_or_path, "model", CONFIGURATIONS))


def outline(
    folder: Path,
    dtype: torch.dtype,
    resolution: int | None = None,
    precision: Precision | None = None,
) -> Backbone:
    """The backbone of a pipeline folder with its network and its VAE on the meta device, without encoders.

    Args:
        folder: needs the configurations alone; see `configuration_folder`.
        dtype: of the network; the VAE is in float32.
        resolution: see `Backbone`.
        precision: see `Backbone.from_pretrained`; nf4 counts as int8, because only a GPU can make it.

    Raises:
        WadiError: a configuration is missing or damaged, or this class of pipeline cannot be distilled.
    """
    kind = backbone_class(folder)
    index = read_json(folder / "model_index.json")
    taken = inspect.signature(kind.pipeline_class.__init__).parameters
    parts = {name: None for name, argument in taken.items() if argument.default is argument.empty}
    parts |= {name: None if isinstance(value, list) else value for name, value in index.items()}
    parts.pop("self")
    classes = networks(folder, index) | {kind.network_name: kind.network_class}
    try:
        with META:
            for name in (kind.network_name, "vae"):
                parts[name] = classes[name].from_config(read_json(folder / name / "config.json"))
        network = parts[kind.network_name]
        nn.Module.to(network, dtype)  # diffusers' own `to` logs a warning
        if precision is not None:
            small = "int8" if precision == "nf4" else precision
            store_base(network, kind.layers(network, kind.student_pattern), small, META)
        scheduler = getattr(diffusers, index["scheduler"][1])
        parts["scheduler"] = scheduler.from_pretrained(folder, subfolder="scheduler")
        parts["requires_safety_checker"] = False
        pipeline = kind.pipeline_class(**{name: part for name, part in parts.items() if name in taken})
        unread = type(kind.text_class.__name__, (_Unread, kind.text_class), {})
        return type(kind.__name__, (kind,), {"text_class": unread})(pipeline, META, folder, resolution)
    except WadiError:
        raise
    except Exception as error:  # a broken folder fails in many ways
        raise WadiError(f"{folder}: its configurations cannot be read: {first_line(error)}") from error


def outlined_encoders(folder: Path, backbone: Backbone) -> dict[str, nn.Module]:
    """The text encoders of an outlined backbone by name, on the meta device, in the dtypes of encoding.

    Raises:
        WadiError: a configuration is missing or damaged.
    """
    classes, dtypes, found = (
        networks(folder, read_json(folder / "model_index.json")),
        backbone.text.dtypes,
        {},
    )
    for name in (name for name in backbone.text.parts if name in classes):
        try:
            config = classes[name].config_class.from_pretrained(folder / name)
            with META:
                module = classes[name](config)
        except Exception as error:  # a broken folder fails in many ways
            raise WadiError(f"{folder / name}: cannot be read: {first_line(error)}") from error
        found[name] = module.to(dtypes.get(name, dtypes["default"])).requires_grad_(False).eval()
    return found


def encoder_tokens(backbone: Backbone, encoder: nn.Module) -> int:
    """How many tokens of a prompt a text encoder reads, without what the pipeline writes around it."""
    own = call_default(type(backbone.pipeline), "max_sequence_length")
    positions = getattr(encoder.config, "max_position_embeddings", None) or 2**31
    return min(positions, 2**31 if own is None else own)


def longest_condition(backbone: Backbone, encoders: Mapping[str, nn.Module], n: int) -> Condition:
    """The condition of n prompts that are as long as they may be, on the meta device.

    Args:
        backbone: from `outline`.
        encoders: from `outlined_encoders`.
        n: number of prompts.
    """
    lengths = [encoder_tokens(backbone, encoder) for encoder in encoders.values()]
    # in Stable Diffusion 3 the tokens of T5 follow those of the CLIPs; in SDXL both encoders read the same
    tokens = lengths[0] + lengths[-1] if isinstance(backbone, SD3Backbone) else lengths[-1]
    config, condition = backbone.network.config, {}
    width = next(config[name] for name in _WIDTHS if config.get(name))
    for name in backbone.text.dimensions:
        if name == STATES:
            condition[name] = torch.empty(n, tokens, width, dtype=backbone.dtype, device=META)
        elif name == MASK:
            condition[name] = torch.empty(n, tokens, dtype=torch.bool, device=META)
        else:
            pooled = config.get("pooled_projection_dim") or (
                config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            )
            condition[name] = torch.empty(n, pooled, dtype=backbone.dtype, device=META)
    return condition
