"""Write teachers with random weights at the exact configurations of published models.

    python benchmarks/teachers.py sdxl --out teachers/sdxl
    wadi distill --preset sdxl --teacher teachers/sdxl --prompts prompts.txt --max-train-steps 3

Memory and time do not depend on what the weights say, so such a teacher shows what a run of the published
model needs. Its images are noise. U-Net or transformer, VAE and scheduler are the published ones. The text
encoders give embeddings of the published widths but have one narrow layer, and the tokenizers know single
characters.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
import tyro
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from directions import write_network

from wadi.errors import WadiError
from wadi.files import write_json

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "attention_head_dim": 64}
_SD35_MEDIUM = {**_SD3, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
_SD35_LARGE = {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
_PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
}
_CLIP, _POOLED = "CLIPTextModel", "CLIPTextModelWithProjection"


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        pipeline: its class in diffusers.
        network: class of its U-Net or transformer.
        config: where that differs from the class's defaults.
        vae: the same for its AutoencoderKL.
        scheduler: class and options.
        encoders: class and width of each text encoder.
    """

    pipeline: str
    network: str
    config: dict[str, Any]
    vae: dict[str, Any]
    scheduler: tuple[str, dict[str, Any]]
    encoders: tuple[tuple[str, int], ...]


def _flow(shift: float = 3.0, **options: Any) -> tuple[str, dict[str, Any]]:
    return "FlowMatchEulerDiscreteScheduler", {"shift": shift, **options}


def _sd3(config: dict[str, Any]) -> Model:
    vae = {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    encoders = ((_POOLED, 768), (_POOLED, 1280), ("T5EncoderModel", 4096))
    network = {"sample_size": 128, "pos_embed_max_size": 192, **config}
    vae |= {"use_quant_conv": False, "use_post_quant_conv": False}
    return Model("StableDiffusion3Pipeline", "SD3Transformer2DModel", network, vae, _flow(), encoders)


def _flux(guidance: bool) -> Model:
    vae = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    vae |= {"use_quant_conv": False, "use_post_quant_conv": False}
    scheduler = _flow(3.0, use_dynamic_shifting=True) if guidance else _flow(1.0)
    encoders = ((_CLIP, 768), ("T5EncoderModel", 4096))
    config = {"guidance_embeds": guidance}
    return Model("FluxPipeline", "FluxTransformer2DModel", config, vae, scheduler, encoders)


MODELS = {
    "sd15": Model(
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768},
        {},
        ("PNDMScheduler", {**BETAS, "skip_prk_steps": True}),
        ((_CLIP, 768),),
    ),
    "sdxl": Model(
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        _SDXL,
        {"scaling_factor": 0.13025, "sample_size": 1024},
        ("EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "leading"}),
        ((_CLIP, 768), (_POOLED, 1280)),
    ),
    "pixart-1024": Model(
        "PixArtAlphaPipeline",
        "PixArtTransformer2DModel",
        _PIXART,
        {},
        ("DPMSolverMultistepScheduler", {}),
        (("T5EncoderModel", 4096),),
    ),
    "sd3-medium": _sd3(_SD3),
    "sd35-medium": _sd3(_SD35_MEDIUM | {"qk_norm": "rms_norm"}),
    "sd35-large": _sd3(_SD35_LARGE | {"qk_norm": "rms_norm"}),
    "flux-dev": _flux(guidance=True),
    "flux-schnell": _flux(guidance=False),
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
"""What the VAEs of all these models have in common."""


@dataclass
class Options:
    """Write a teacher with random weights."""

    model: tyro.conf.Positional[Literal[tuple(MODELS)]]
    """The published model whose configurations it has."""
    out: Path
    """Folder to write; it must not exist."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights in the files."""
    weights: bool = True
    """Write weights; without them the folder is enough for `wadi distill --plan`."""


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """One token a byte."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> transformers.T5Tokenizer:
    """One token a character."""
    letters = [(chr(i), -3.0) for i in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def text_encoder(kind: str, width: int, words: int) -> nn.Module:
    """A text encoder of one layer that gives states of a width."""
    if kind == "T5EncoderModel":
        small = {"d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
        return transformers.T5EncoderModel(transformers.T5Config(vocab_size=words, d_model=width, **small))
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 64, "vocab_size": words}
    # SDXL and Stable Diffusion 3 read the states before the last layer
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**sizes, **layers, **ids))


def write_teacher(options: Options) -> None:
    """Write the folder.

    Raises:
        WadiError: the folder exists.
    """
    model, out, dtype = MODELS[options.model], options.out, getattr(torch, options.dtype)
    if out.exists():
        raise WadiError(f"{out}: exists; name a new folder")
    part = "unet" if "UNet" in model.network else "transformer"
    index: dict[str, Any] = {"_class_name": model.pipeline, "scheduler": ["diffusers", model.scheduler[0]]}
    if model.pipeline == "StableDiffusionPipeline":  # its constructor asks for these
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    networks = ((part, model.network, model.config), ("vae", "AutoencoderKL", _VAE | model.vae))
    for name, kind, config in networks:
        index[name] = ["diffusers", kind]
        with torch.device("meta"):
            network = getattr(diffusers, kind)(**config)
        if options.weights:
            write_network(network, out / name, dtype if name == part else torch.float32, changed=False)
        else:
            network.save_config(out / name)
    getattr(diffusers, model.scheduler[0])(**model.scheduler[1]).save_pretrained(out / "scheduler")
    for number, (kind, width) in enumerate(model.encoders, 1):
        suffix = "" if number == 1 else f"_{number}"
        tokenizer = t5_tokenizer() if kind == "T5EncoderModel" else clip_tokenizer()
        index[f"text_encoder{suffix}"] = ["transformers", kind]
        index[f"tokenizer{suffix}"] = ["transformers", type(tokenizer).__name__]
        tokenizer.save_pretrained(out / f"tokenizer{suffix}")
        encoder = text_encoder(kind, width, len(tokenizer))
        if options.weights:
            encoder.save_pretrained(out / f"text_encoder{suffix}")
        else:
            encoder.config.save_pretrained(out / f"text_encoder{suffix}")
    write_json(out / "model_index.json", index)


if __name__ == "__main__":
    write_teacher(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
