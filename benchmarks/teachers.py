"""Write teachers with random weights at the exact configurations of published models.

    python benchmarks/teachers.py sdxl --out teachers/sdxl
    wadi distill --preset sdxl --teacher teachers/sdxl --prompts prompts.txt --max-train-steps 3

Memory and time do not depend on what the weights say, so such a teacher shows what a run of the published
model needs. Its images are noise. U-Net or transformer, VAE and scheduler are the published ones. The text
encoders give embeddings of the published widths but have one or two narrow layers, and the tokenizers know
single characters.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
import tyro
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from directions import write_network
from published import NETWORKS

from wadi.errors import WadiError
from wadi.files import write_json

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_CLIP, _POOLED = "CLIPTextModel", "CLIPTextModelWithProjection"


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        pipeline: its class in diffusers.
        vae: configuration of its AutoencoderKL, where that differs from `_VAE`.
        scheduler: class and options.
        encoders: class and width of each text encoder.
    """

    pipeline: str
    vae: dict[str, Any]
    scheduler: tuple[str, dict[str, Any]]
    encoders: tuple[tuple[str, int], ...]


def _flow(shift: float = 3.0, **options: Any) -> tuple[str, dict[str, Any]]:
    return "FlowMatchEulerDiscreteScheduler", {"shift": shift, **options}


_FLOW_VAE = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_SD3 = Model(
    "StableDiffusion3Pipeline",
    {**_FLOW_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    _flow(),
    ((_POOLED, 768), (_POOLED, 1280), ("T5EncoderModel", 4096)),
)
_FLUX = Model(
    "FluxPipeline",
    {**_FLOW_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    _flow(3.0, use_dynamic_shifting=True),
    ((_CLIP, 768), ("T5EncoderModel", 4096)),
)
MODELS = {
    "sd15": Model(
        "StableDiffusionPipeline",
        {},
        ("PNDMScheduler", {**BETAS, "skip_prk_steps": True}),
        ((_CLIP, 768),),
    ),
    "sdxl": Model(
        "StableDiffusionXLPipeline",
        {"scaling_factor": 0.13025, "sample_size": 1024},
        ("EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "leading"}),
        ((_CLIP, 768), (_POOLED, 1280)),
    ),
    "pixart-1024": Model(
        "PixArtAlphaPipeline",
        {},
        ("DPMSolverMultistepScheduler", {}),
        (("T5EncoderModel", 4096),),
    ),
    **dict.fromkeys(("sd3-medium", "sd35-medium", "sd35-large"), _SD3),
    "flux-dev": _FLUX,
    "flux-schnell": replace(_FLUX, scheduler=_flow(1.0)),
}
"""By names of `published.NETWORKS`, which has their U-Nets and transformers."""
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
    """A narrow text encoder that gives states of a width."""
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
    network = NETWORKS[options.model]
    part = "unet" if "UNet" in network[0] else "transformer"
    index: dict[str, Any] = {"_class_name": model.pipeline, "scheduler": ["diffusers", model.scheduler[0]]}
    if model.pipeline == "StableDiffusionPipeline":  # its constructor asks for these
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    networks = ((part, *network), ("vae", "AutoencoderKL", _VAE | model.vae))
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
