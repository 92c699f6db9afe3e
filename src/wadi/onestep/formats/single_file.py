"""A pipeline as one file in the original layout of its family, as Civitai has them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from wadi.errors import WadiError, tell
from wadi.onestep.formats.asked import transformer_tensors
from wadi.onestep.formats.encoders import clip_tensors, open_clip_tensors, t5_tensors
from wadi.onestep.formats.ldm import LDM_UNET_KEY, Tensors, unet_tensors, vae_tensors

_VAE = "first_stage_model."
_ENCODERS = "text_encoders."


def single_file_tensors(pipeline: DiffusionPipeline) -> Tensors:
    """All weights of a pipeline by their names in the original layout.

    Args:
        pipeline: Stable Diffusion 1 or 2, SDXL, Stable Diffusion 3 or FLUX.1.

    Raises:
        WadiError: the family has no original layout that diffusers reads, or a part has no place in it.
    """
    kind = type(pipeline).__name__
    layout = _LAYOUTS.get(kind)
    if layout is None:
        raise WadiError(
            f"--format single-file: no file in an original layout is known for a {kind}, but for "
            f"{', '.join(_LAYOUTS)}; choose --format diffusers, or --format {_network(pipeline)} for ComfyUI"
        )
    if not isinstance(pipeline.vae, AutoencoderKL):
        raise WadiError(
            f"--format single-file: the original layout is for an AutoencoderKL, and the model has a "
            f"{type(pipeline.vae).__name__}; choose --format diffusers"
        )
    encoder = pipeline.text_encoder
    if not isinstance(encoder, (CLIPTextModel, CLIPTextModelWithProjection)):
        raise WadiError(
            "--format single-file: the original layout is for a CLIP, and the model's text encoder is a "
            f"{type(encoder).__name__}; choose --format diffusers"
        )
    return layout(pipeline)


def _network(pipeline: DiffusionPipeline) -> str:
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def _stable_diffusion(pipeline: DiffusionPipeline) -> Tensors:
    """Stable Diffusion 1 has OpenAI's CLIP with its quick GELU, Stable Diffusion 2 has OpenCLIP."""
    encoder, config = pipeline.text_encoder, pipeline.scheduler.config
    if encoder.config.hidden_act == "quick_gelu":
        text = clip_tensors(encoder, "cond_stage_model.transformer.")
    else:
        text = open_clip_tensors(encoder, "cond_stage_model.model.")
    if config.prediction_type == "v_prediction":
        tell(
            "the file cannot say that the student predicts v: programs guess it, so choose v prediction "
            "there (ComfyUI: the node ModelSamplingDiscrete; A1111: a .yaml file beside it)"
        )
    return unet_tensors(pipeline.unet) | vae_tensors(pipeline.vae, _VAE) | text


def _sdxl(pipeline: DiffusionPipeline) -> Tensors:
    config, marks = pipeline.scheduler.config, {}
    if config.prediction_type == "v_prediction":
        marks["v_pred"] = torch.zeros(0)
    if config.get("rescale_betas_zero_snr"):
        marks["ztsnr"] = torch.zeros(0)
    return (
        unet_tensors(pipeline.unet)
        | vae_tensors(pipeline.vae, _VAE)
        | clip_tensors(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        | open_clip_tensors(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
        | marks
    )


def _sd3(pipeline: DiffusionPipeline) -> Tensors:
    text = clip_tensors(pipeline.text_encoder, f"{_ENCODERS}clip_l.transformer.")
    text |= clip_tensors(pipeline.text_encoder_2, f"{_ENCODERS}clip_g.transformer.")
    if pipeline.text_encoder_3 is not None:
        text |= t5_tensors(pipeline.text_encoder_3, f"{_ENCODERS}t5xxl.transformer.")
    return _transformer(pipeline) | vae_tensors(pipeline.vae, _VAE) | text


def _flux(pipeline: DiffusionPipeline) -> Tensors:
    text = clip_tensors(pipeline.text_encoder, f"{_ENCODERS}clip_l.transformer.")
    text |= t5_tensors(pipeline.text_encoder_2, f"{_ENCODERS}t5xxl.transformer.")
    return _transformer(pipeline) | vae_tensors(pipeline.vae, "vae.") | text


def _transformer(pipeline: DiffusionPipeline) -> Tensors:
    named = transformer_tensors(pipeline.transformer)
    return {LDM_UNET_KEY + name: tensor for name, tensor in named.items()}


_LAYOUTS: dict[str, Callable[[DiffusionPipeline], Tensors]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
}
