"""A tiny pipeline of every kind that can be distilled, and the stock pipeline asked as its backbone is."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtSigmaPipeline

from tests.tiny import tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from tests.tiny_flows import tiny_flux, tiny_klein, tiny_qwen_image, tiny_sana, tiny_z_image
from wadi.backbones import BACKBONES, Backbone, KleinBackbone, QwenImageBackbone
from wadi.backbones.flux import FluxBackbone, pack, unpack
from wadi.diffusion import RectifiedFlow
from wadi.onestep.loading import guidance_arguments, stock_arguments
from wadi.onestep.scheduler import student_scheduler

SIDE = 32
"""Pixels a side, for networks that may have any."""
PROMPTS = ["a red cat", "a big dog on a mat"]
TOKENS = 96
"""Tokens of an encoded prompt, instead of the pipelines' hundreds, for speed."""


def tiny_sigma():
    """A PixArt-Sigma of the same parts as the tiny PixArt-alpha, whose tokenizer takes more tokens."""
    pipeline = PixArtSigmaPipeline(**tiny_pixart().components)
    pipeline.tokenizer.model_max_length = 512
    return pipeline


MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
CASES = {
    "sd": tiny_pipeline,
    "sdxl": tiny_sdxl,
    "pixart-alpha": tiny_pixart,
    "pixart-sigma": tiny_sigma,
    "sd3": tiny_sd3,
    "sd3.5-medium": partial(tiny_sd3, **MEDIUM),
    "sd3.5-large": partial(tiny_sd3, qk_norm="rms_norm"),
    "flux-dev": tiny_flux,
    "flux-schnell": partial(tiny_flux, dev=False),
    "sana": tiny_sana,
    "klein": tiny_klein,
    "z-image": tiny_z_image,
    "qwen-image": tiny_qwen_image,
}
NEARLY = {"klein", "qwen-image"}
"""Whose latents are normalised by other operations than the stock pipeline's: equal to 1e-5."""


def of(pipeline, tokens: int | None = TOKENS) -> Backbone:
    """The backbone of a tiny pipeline, with fewer tokens than the pipeline's own unless ``None``."""
    own = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    side = SIDE if own.config.get("sample_size") is None else None
    backbone = BACKBONES[type(pipeline).__name__](pipeline, resolution=side)
    return backbone if tokens is None else shortened(backbone, tokens)


def shortened(backbone: Backbone, tokens: int = TOKENS) -> Backbone:
    """The same with fewer tokens, unless prompts begin behind them, as Qwen-Image's do."""
    if backbone.text.length is not None and not isinstance(backbone, QwenImageBackbone):
        backbone.text.length = tokens
    return backbone


def make(case: str, tokens: int | None = TOKENS) -> Backbone:
    return of(CASES[case](), tokens)


def noise(backbone: Backbone, n: int = 2) -> torch.Tensor:
    return torch.randn(n, *backbone.latent_shape, generator=torch.Generator().manual_seed(5))


def stock(backbone: Backbone, prompts=PROMPTS, z=None, scale: float = 1.0, **options):
    """Images of the stock pipeline; its latents as the network has them, with output_type="latent"."""
    pipeline, (height, width) = backbone.pipeline, backbone.image_size
    packs = isinstance(backbone, (FluxBackbone, QwenImageBackbone))
    arguments = stock_arguments(pipeline) | guidance_arguments(pipeline, scale) | options
    if backbone.text.length is not None:
        arguments["max_sequence_length"] = backbone.text.length
    if z is not None:
        arguments["latents"] = pack(z) if packs else z
    images = pipeline(prompt=list(prompts), height=height, width=width, **arguments).images
    if options.get("output_type") != "latent":
        return images
    if isinstance(backbone, KleinBackbone):
        return backbone.scaled(images)
    return unpack(images, *backbone.latent_shape[1:]) if packs else images


def as_shipped(backbone: Backbone):
    """Give the stock pipeline the scheduler that its one-step student ships with."""
    flow = isinstance(backbone.schedule(), RectifiedFlow)
    scheduler = backbone.pipeline.scheduler
    own = FlowMatchEulerDiscreteScheduler(shift=1.0) if flow else student_scheduler(scheduler)
    backbone.pipeline.scheduler = own
    return own


def close(case: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equal bits, or 1e-5 where the case is one of `NEARLY`."""
    bound = 1e-5 if case in NEARLY else 0.0
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
