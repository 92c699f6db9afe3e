"""What training needs to know about each kind of pipeline, one file for each kind.

| pipeline | network | what it predicts |
| --- | --- | --- |
| `StableDiffusionPipeline`, `StableDiffusionXLPipeline` | `UNet2DConditionModel` | epsilon or v |
| `PixArtAlphaPipeline`, `PixArtSigmaPipeline` | `PixArtTransformer2DModel` | epsilon |
| `StableDiffusion3Pipeline` | `SD3Transformer2DModel` | v of a rectified flow |
| `FluxPipeline` | `FluxTransformer2DModel` | v of a rectified flow |
| `SanaPipeline` | `SanaTransformer2DModel` | v of a rectified flow |
| `Flux2KleinPipeline` | `Flux2Transformer2DModel` | v of a rectified flow |
| `ZImagePipeline` | `ZImageTransformer2DModel` | v of a rectified flow, with the other sign |
| `QwenImagePipeline` | `QwenImageTransformer2DModel` | v of a rectified flow |
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from wadi.backbones.base import Backbone
from wadi.backbones.flux import FluxBackbone
from wadi.backbones.klein import KleinBackbone
from wadi.backbones.pixart import PixArtBackbone, PixArtSigmaBackbone
from wadi.backbones.qwen import QwenImageBackbone
from wadi.backbones.sana import SanaBackbone
from wadi.backbones.sd import UNetBackbone
from wadi.backbones.sd3 import SD3Backbone
from wadi.backbones.sdxl import SDXLBackbone
from wadi.backbones.text import PromptEncoder
from wadi.backbones.zimage import ZImageBackbone
from wadi.device import Precision
from wadi.errors import WadiError
from wadi.lorad import LoRaDConfig
from wadi.onestep.loading import pipeline_class_name, pipeline_folder

__all__ = [
    "BACKBONES",
    "Backbone",
    "FluxBackbone",
    "KleinBackbone",
    "PixArtBackbone",
    "PixArtSigmaBackbone",
    "PromptEncoder",
    "QwenImageBackbone",
    "SD3Backbone",
    "SDXLBackbone",
    "SanaBackbone",
    "UNetBackbone",
    "ZImageBackbone",
    "backbone_class",
    "fake_config",
    "load_backbone",
    "load_prompt_encoder",
    "student_config",
]

FAKE_RANK = 32
"""Default rank of a fake model's adapter, from the paper."""

BACKBONES: dict[str, type[Backbone]] = {
    backbone.pipeline_class.__name__: backbone
    for backbone in (
        UNetBackbone,
        SDXLBackbone,
        PixArtBackbone,
        PixArtSigmaBackbone,
        SD3Backbone,
        FluxBackbone,
        SanaBackbone,
        KleinBackbone,
        ZImageBackbone,
        QwenImageBackbone,
    )
}
"""Backbones by the pipeline class in model_index.json."""


def load_backbone(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    resolution: int | None = None,
    precision: Precision | None = None,
) -> Backbone:
    """Load the backbone of the pipeline in a folder or hub id; see `Backbone.from_pretrained`.

    Raises:
        WadiError: this class of pipeline cannot be distilled, or as in `Backbone.from_pretrained`.
    """
    folder = pipeline_folder(name_or_path)
    return _kind(name_or_path, folder).from_pretrained(folder, dtype, device, resolution, precision)


def load_prompt_encoder(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PromptEncoder:
    """Load the tokenizers of such a pipeline, without weights; see `PromptEncoder.from_pretrained`.

    Raises:
        WadiError: as `load_backbone`.
    """
    folder = pipeline_folder(name_or_path)
    return _kind(name_or_path, folder).text_class.from_pretrained(folder, dtype, device)


def backbone_class(name_or_path: str | Path) -> type[Backbone]:
    """The class of the backbone of the pipeline in a folder or hub id.

    Raises:
        WadiError: as `load_backbone`.
    """
    return _kind(name_or_path, pipeline_folder(name_or_path))


def student_config(network: nn.Module, r: int | None = None) -> LoRaDConfig:
    """The configuration of a student's adapter, for the layers `Backbone.student_layers`.

    Args:
        network: a network of one of the architectures, of any size, with or without an adapter.
        r: rank; `Backbone.student_rank` when ``None``.

    Raises:
        ValueError: the network is of another architecture, or the rank is less than 1.
    """
    kind = _architecture(network)
    layers = kind.layers(network, kind.student_pattern)
    return LoRaDConfig(r=kind.student_rank if r is None else r, target_modules=layers)


def fake_config(network: nn.Module, r: int | None = None) -> LoRaDConfig:
    """The configuration of a fake model's adapter, for `Backbone.fake_layers`, by default with rank 32.

    Arguments and errors are those of `student_config`.
    """
    kind = _architecture(network)
    layers = kind.layers(network, kind.fake_pattern)
    return LoRaDConfig(r=FAKE_RANK if r is None else r, target_modules=layers)


def _kind(name_or_path: str | Path, folder: Path) -> type[Backbone]:
    name = pipeline_class_name(folder)
    if name not in BACKBONES:
        raise WadiError(
            f"{name_or_path}: holds a {name}, which wadi cannot distil; name one of {', '.join(BACKBONES)}"
        )
    return BACKBONES[name]


def _architecture(network: nn.Module) -> type[Backbone]:
    found = next((kind for kind in BACKBONES.values() if kind.drives(network)), None)
    if found is None:
        known = ", ".join(dict.fromkeys(kind.network_class.__name__ for kind in BACKBONES.values()))
        raise ValueError(
            f"No layers are known for a {type(network).__name__}, only for {known}; for other models name "
            "the target_modules in a LoRaDConfig"
        )
    return found
