"""Write teachers with random weights at the exact configurations of published models.

    python benchmarks/teachers.py sdxl --out teachers/sdxl
    wadi distill --preset sdxl --teacher teachers/sdxl --prompts prompts.txt --max-train-steps 3

Memory and time do not depend on what the weights say, so such a teacher shows what a run of the published
model needs. Its images are noise. U-Net or transformer, VAE and scheduler are the published ones. The text
encoders give embeddings of the published widths but have few and narrow layers, and the tokenizers know
single characters.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from directions import write_network
from encoders import TOKENIZERS, text_encoder
from published import NETWORKS

from wadi.errors import WadiError
from wadi.files import write_json

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_CLIP, _POOLED, _T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
_KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
_FLOW_KL = {**_KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        pipeline: its class in diffusers.
        vae: class and configuration.
        scheduler: class and options.
        encoders: class and width of each text encoder, and layers where the pipeline reads deep ones.
    """

    pipeline: str
    vae: tuple[str, dict[str, Any]]
    scheduler: tuple[str, dict[str, Any]]
    encoders: tuple[tuple[str, int] | tuple[str, int, int], ...]


def _kl(**options: Any) -> tuple[str, dict[str, Any]]:
    return "AutoencoderKL", {**_KL, **options}


def _flow_kl(scaling: float, shift: float) -> tuple[str, dict[str, Any]]:
    own = {"scaling_factor": scaling, "shift_factor": shift, "sample_size": 1024}
    return "AutoencoderKL", {**_FLOW_KL, **own}


def _flow(shift: float = 3.0, **options: Any) -> tuple[str, dict[str, Any]]:
    return "FlowMatchEulerDiscreteScheduler", {"shift": shift, **options}


_SD3 = Model(
    "StableDiffusion3Pipeline",
    _flow_kl(1.5305, 0.0609),
    _flow(),
    ((_POOLED, 768), (_POOLED, 1280), (_T5, 4096)),
)
_FLUX = Model(
    "FluxPipeline",
    _flow_kl(0.3611, 0.1159),
    _flow(3.0, use_dynamic_shifting=True),
    ((_CLIP, 768), (_T5, 4096)),
)
_SANA = Model(
    "SanaPipeline",
    (
        "AutoencoderDC",
        {
            "encoder_block_types": _DC_BLOCKS,
            "decoder_block_types": _DC_BLOCKS,
            "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        },
    ),
    (
        "DPMSolverMultistepScheduler",
        {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ),
    (("Gemma2Model", 2304),),
)
_KLEIN = Model(
    "Flux2KleinPipeline",
    ("AutoencoderKLFlux2", {}),
    _flow(3.0, use_dynamic_shifting=True),
    (("Qwen3ForCausalLM", 2560, 28),),
)
MODELS = {
    "tiny": Model(
        "StableDiffusionPipeline",
        _kl(block_out_channels=(32,) * 4),
        ("PNDMScheduler", {**BETAS, "skip_prk_steps": True}),
        ((_CLIP, 32),),
    ),
    "sd15": Model(
        "StableDiffusionPipeline",
        _kl(),
        ("PNDMScheduler", {**BETAS, "skip_prk_steps": True}),
        ((_CLIP, 768),),
    ),
    "sdxl": Model(
        "StableDiffusionXLPipeline",
        _kl(scaling_factor=0.13025, sample_size=1024),
        ("EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "leading"}),
        ((_CLIP, 768), (_POOLED, 1280)),
    ),
    "pixart-1024": Model("PixArtAlphaPipeline", _kl(), ("DPMSolverMultistepScheduler", {}), ((_T5, 4096),)),
    **dict.fromkeys(("sd3-medium", "sd35-medium", "sd35-large"), _SD3),
    "flux-dev": _FLUX,
    "flux-schnell": replace(_FLUX, scheduler=_flow(1.0)),
    **dict.fromkeys(("sana-1.6b", "sana-0.6b"), _SANA),
    "klein-4b": _KLEIN,
    "klein-9b": replace(_KLEIN, encoders=(("Qwen3ForCausalLM", 4096, 28),)),
    "z-image": Model("ZImagePipeline", _flow_kl(0.3611, 0.1159), _flow(), (("Qwen3Model", 2560),)),
    "qwen-image": Model(
        "QwenImagePipeline",
        ("AutoencoderKLQwenImage", {}),
        _flow(1.0, use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        (("Qwen2_5_VLForConditionalGeneration", 3584),),
    ),
}
"""By names of `published.NETWORKS`, which has their U-Nets and transformers."""


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
    networks = ((part, *network), ("vae", *model.vae))
    for name, kind, config in networks:
        index[name] = ["diffusers", kind]
        with torch.device("meta"):
            network = getattr(diffusers, kind)(**config)
        if options.weights:
            write_network(network, out / name, dtype if name == part else torch.float32, changed=False)
        else:
            network.save_config(out / name)
    getattr(diffusers, model.scheduler[0])(**model.scheduler[1]).save_pretrained(out / "scheduler")
    for number, (kind, width, *layers) in enumerate(model.encoders, 1):
        suffix = "" if number == 1 else f"_{number}"
        tokenizer = TOKENIZERS[kind]()
        index[f"text_encoder{suffix}"] = ["transformers", kind]
        index[f"tokenizer{suffix}"] = ["transformers", type(tokenizer).__name__]
        tokenizer.save_pretrained(out / f"tokenizer{suffix}")
        encoder = text_encoder(kind, width, len(tokenizer), *layers)
        if options.weights:
            encoder.save_pretrained(out / f"text_encoder{suffix}")
        else:
            encoder.config.save_pretrained(out / f"text_encoder{suffix}")
    write_json(out / "model_index.json", index)


if __name__ == "__main__":
    write_teacher(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
