"""Check from its configurations that wadi can use a pipeline, before weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from wadi.diffusion.schedule import is_flow
from wadi.errors import WadiError
from wadi.files import read_json

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that are not needed to make an image of a prompt; they are not loaded."""

NETWORKS = ("unet", "transformer")
"""Names of the network that is distilled, of which a pipeline has one."""

NEEDED = (
    *("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    *("unet", "transformer", "scheduler"),
)
"""Parts that must be there if the pipeline lists them."""

_USABLE = "name a text-to-image pipeline, such as a StableDiffusionPipeline"
_SD, _SDXL, _SD3 = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"
_PIXART = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
_FLUX = "FluxPipeline"
_SANA, _KLEIN = "SanaPipeline", "Flux2KleinPipeline"
_Z, _QWEN = "ZImagePipeline", "QwenImagePipeline"
_TAKES = {_SD3: 16, _FLUX: 64, _SANA: 32, _KLEIN: 128, _Z: 16, _QWEN: 64} | dict.fromkeys(_PIXART, 4)
"""Pipelines with a transformer, and the channels that it takes where its configuration does not say."""
_KLEIN_READS = 27
"""The last layer of its text encoder whose states FLUX.2-klein is told."""
_PACKED = (_FLUX, _KLEIN, _QWEN)
"""Those whose transformer takes four latents as one token."""
_ANY_SIZE = (_FLUX, _KLEIN, _Z, _QWEN)
"""Those whose transformer does not say on which size it was trained."""
_FLOWS = dict.fromkeys((_SD, _SDXL, *_PIXART), False) | dict.fromkeys(
    (_SD3, _FLUX, _SANA, _KLEIN, _Z, _QWEN), True
)
"""Whether a pipeline runs with the schedule of a rectified flow. Nothing is known of other pipelines."""
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_CONDITIONS = {
    "class_embed_type": "takes a class as its condition",
    "num_class_embeds": "takes a class as its condition",
    "encoder_hid_dim_type": "takes conditions that are no text embeddings",
    "time_cond_proj_dim": "takes the guidance scale as a condition, as latent consistency models do, which "
    "need few steps already",
}


def parts(folder: Path, index: Mapping[str, Any]) -> Iterator[tuple[str, type | None]]:
    """Names and classes of the parts that a model_index.json lists; ``None`` for a class of another library.

    Raises:
        WadiError: diffusers or transformers does not have the class.
    """
    for name, value in index.items():
        if not isinstance(value, list) or len(value) != 2 or value[0] is None or name in UNUSED:
            continue
        library, kind = value
        if library not in _LIBRARIES:
            yield name, None
            continue
        found = getattr(_LIBRARIES[library], str(kind), None)
        if not isinstance(found, type):
            raise WadiError(
                f"{folder / 'model_index.json'}: lists {name} as {kind}, but {library} "
                f"{_LIBRARIES[library].__version__} has no such class; update {library} or name another model"
            )
        yield name, found


def networks(folder: Path, index: Mapping[str, Any]) -> dict[str, type[torch.nn.Module]]:
    """The parts that hold weights, by name, and their classes; see `parts`."""
    return {name: kind for name, kind in parts(folder, index) if kind and issubclass(kind, torch.nn.Module)}


def check_parts(folder: Path, index: Mapping[str, Any]) -> None:
    """Check from the configurations of a pipeline folder that wadi can use it, before weights are read.

    Raises:
        WadiError: a part is missing, the parts do not fit each other, or the network needs other inputs than
            noisy latents, a timestep and text embeddings.
    """
    name = str(index.get("_class_name"))
    if not isinstance(getattr(diffusers, name, None), type):
        raise WadiError(
            f"{folder}: holds a {name}, but diffusers {diffusers.__version__} has no such class; {_USABLE}"
        )
    for part in NEEDED:
        if part in index and (not isinstance(index[part], list) or index[part][:1] == [None]):
            raise WadiError(f"{folder / 'model_index.json'}: lists no {part}; name a whole pipeline")
    for part, _ in parts(folder, index):
        if not (folder / part).is_dir():
            raise WadiError(f"{folder}: its model_index.json lists {part!r}, but the sub-folder is missing")
    _check_scheduler(folder, index, name)
    if "unet" in index:
        _check_unet(folder, _config(folder / "unet"), name)
    elif "transformer" in index:
        _check_transformer(folder, _config(folder / "transformer"), name)
    else:
        raise WadiError(f"{folder}: holds a {name}, and lists neither a U-Net nor a transformer; {_USABLE}")


def _config(part: Path) -> dict[str, Any]:
    """The part's configuration, empty if it has none. Loading the part then raises."""
    return _config_of(part / "config.json")


def _config_of(file: Path) -> dict[str, Any]:
    config = read_json(file) if file.is_file() else {}
    if not isinstance(config, dict):
        raise WadiError(f"{file}: is not a configuration; fetch the file again")
    return config


def _check_scheduler(folder: Path, index: Mapping[str, Any], pipeline: str) -> None:
    """Raise where the stock pipeline cannot be called with the one-step scheduler of such a model.

    Pipelines of the older kind multiply the noise by a number that the schedulers of flows do not have, and
    Stable Diffusion 3 is a flow.
    """
    file, listed = folder / "scheduler" / "scheduler_config.json", index.get("scheduler") or []
    if pipeline not in _FLOWS or not file.is_file() or len(listed) != 2:  # loading the part tells the rest
        return
    flow = is_flow({**_config_of(file), "_class_name": listed[1]})
    if flow != _FLOWS[pipeline]:
        needed, found = ("a rectified flow" if each else "a schedule of betas" for each in (not flow, flow))
        raise WadiError(
            f"{file}: is a {listed[1]} of {found}, and a {pipeline} needs a scheduler of {needed}; fetch the "
            "folder again, or name another model"
        )


def _check_unet(folder: Path, config: dict[str, Any], pipeline: str) -> None:
    where, channels = folder / "unet", config.get("in_channels", 4)
    if channels != (out := config.get("out_channels", 4)):
        raise WadiError(
            f"{where}: the U-Net takes {channels} channels and gives {out}; inpainting and similar models "
            "are not supported, name the text-to-image model"
        )
    for field, what in _CONDITIONS.items():
        if config.get(field) is not None:
            raise WadiError(f"{where}: the U-Net {what} ({field}); name a multi-step text-to-image model")
    added = config.get("addition_embed_type")
    if pipeline == _SDXL and added != "text_time":
        raise WadiError(
            f"{where}: the U-Net has addition_embed_type {added!r}, and a {pipeline} needs 'text_time' (a "
            "pooled embedding and sizes); the two are from different models, so fetch the folder again"
        )
    if added is not None and pipeline == _SD:
        raise WadiError(
            f"{where}: the U-Net needs more inputs than a StableDiffusionPipeline gives (addition_embed_type "
            f"{added!r}, as in Stable Diffusion XL); name another model"
        )
    _check_size(where, config)
    _check_latents(folder, where, channels)
    _check_text(folder, where, config, pipeline)


def _check_transformer(folder: Path, config: dict[str, Any], pipeline: str) -> None:
    if pipeline not in _TAKES:
        return
    where, channels = folder / "transformer", config.get("in_channels", _TAKES[pipeline])
    out, learned = config.get("out_channels") or channels, pipeline in _PIXART
    if pipeline == _QWEN:  # counts what it gives by latents, and not by tokens
        out = 4 * config.get("out_channels", 16)
    if out not in ((channels, 2 * channels) if learned else (channels,)):
        also = ", or twice as many (learned sigma)," if learned else ""
        raise WadiError(
            f"{where}: the transformer takes {channels} channels and gives {out}; only as many{also} can be "
            "used, so name the text-to-image model"
        )
    if pipeline in (_KLEIN, _QWEN, _SANA) and config.get("guidance_embeds", pipeline == _KLEIN):
        raise WadiError(
            f"{where}: the transformer takes the guidance as an input (guidance_embeds), which a {pipeline} "
            "does not give; name another model"
        )
    layers = _config(folder / "text_encoder").get("num_hidden_layers")
    if pipeline == _KLEIN and isinstance(layers, int) and layers < _KLEIN_READS:
        raise WadiError(
            f"{folder / 'text_encoder'}: has {layers} layers, and a {pipeline} reads the states of the "
            f"{_KLEIN_READS}th; the two are from different models"
        )
    if pipeline not in _ANY_SIZE:
        _check_size(where, config)
    _check_latents(folder, where, channels // 4 if pipeline in _PACKED else channels)
    _check_text(folder, where, config, pipeline)


def _check_size(where: Path, config: dict[str, Any]) -> None:
    size = config.get("sample_size")
    sides = size if isinstance(size, list) else [size]
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        raise WadiError(
            f"{where / 'config.json'}: sample_size is {size!r}; write the side of the model's latents there, "
            "such as 64 for images of 512 pixels"
        )


def _check_latents(folder: Path, where: Path, channels: int) -> None:
    vae = _config(folder / "vae")
    latents = vae.get("latent_channels", vae.get("z_dim", channels))
    if latents != channels:
        raise WadiError(
            f"{where}: takes latents of {channels} channels, but the autoencoder in {folder / 'vae'} gives "
            f"{latents}; the two are from different models, so fetch the folder again"
        )


def _check_text(folder: Path, where: Path, network: dict[str, Any], pipeline: str) -> None:
    """Raise if the network takes embeddings of another width than the text encoders give."""
    encoders = [_config(folder / f"text_encoder{suffix}") for suffix in ("", "_2", "_3")]
    for field, gives in _widths(pipeline, network, encoders).items():
        width = network.get(field)
        if isinstance(width, int) and gives is not None and width != gives:
            raise WadiError(
                f"{where}: takes text embeddings of width {width} ({field}), but the text encoders in "
                f"{folder} give {gives}; they are from different models, so fetch the folder again"
            )


def _widths(pipeline: str, network: dict[str, Any], encoders: list[dict[str, Any]]) -> dict[str, int | None]:
    """For fields of the network's configuration, the width from the text encoders; ``None`` if unknown."""
    states = [encoder.get("hidden_size", encoder.get("d_model")) for encoder in encoders]
    pooled = [encoder.get("projection_dim") for encoder in encoders]
    if pipeline == _SDXL:
        sizes = network.get("addition_time_embed_dim")  # of each of six numbers
        return {
            "cross_attention_dim": _sum(states[0], states[1]),
            "projection_class_embeddings_input_dim": _sum(pooled[1], *[sizes] * 6),
        }
    if pipeline == _SD3:
        return {"joint_attention_dim": states[2], "pooled_projection_dim": _sum(pooled[0], pooled[1])}
    if pipeline == _FLUX:
        return {"joint_attention_dim": states[1], "pooled_projection_dim": states[0]}
    if pipeline == _KLEIN:
        return {"joint_attention_dim": _sum(*[states[0]] * 3)}
    if pipeline == _QWEN:
        return {"joint_attention_dim": encoders[0].get("text_config", {}).get("hidden_size", states[0])}
    if pipeline == _Z:
        return {"cap_feat_dim": states[0]}
    if pipeline in (*_PIXART, _SANA):
        return {"caption_channels": states[0]}
    return {} if encoders[1] else {"cross_attention_dim": states[0]}


def _sum(*parts: int | None) -> int | None:
    return None if None in parts else sum(parts)
