"""The rectified flow of the emoji world: Stable Diffusion 3's transformer with two CLIPs and a T5.

Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv 2403.03206).
The classes are those of diffusers and transformers; only the sizes are small. The latents are those of the
other teachers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from wadi.emoji.architecture import Architecture, Networks
from wadi.emoji.dit import TEXT_WIDTH, new_t5_encoder
from wadi.emoji.tokenizer import MAX_LENGTH, build_t5_tokenizer, build_tokenizer, tokenize
from wadi.emoji.unet import clip_config

T5_LENGTH = 256
"""Tokens that the stock pipeline gives T5. Nothing masks the padding, so the training has as many."""

SHIFT = 1.6
"""Shift of the noise levels sigma. With it the median level is 0.62, as that of Stable Diffusion's timesteps
is, with which the other teachers learn the same latents (sigma / (alpha + sigma) is 0.62 at timestep 500).
The shift 3 of Stable Diffusion 3 is for images of 1024 pixels: less noise hides as much of a small image."""

CLIPS = ("text_encoder", "text_encoder_2")


def new_flow_transformer(layers: int = 6, heads: int = 6) -> SD3Transformer2DModel:
    """A transformer with 7.77 M parameters: 6 joint blocks, 192 wide, on 8 x 8 patches of 2 x 2 latents.

    It predicts v = n - x0. As in DiT, the first prediction is zero. Queries and keys are normalised, as in
    Stable Diffusion 3.5, which keeps training in bfloat16 stable.

    Args:
        layers: number of blocks.
        heads: number of attention heads, each 32 wide.
    """
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def encode_text(networks: Networks, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode captions as the stock pipeline does.

    Args:
        networks: the three text encoders by their names in the pipeline.
        ids: (N, 48) int64, 24 tokens of CLIP and 24 of T5.

    Returns:
        States (N, 24 + 256, 128): those of both CLIPs side by side, then T5's. Pooled states (N, 128) of both
        CLIPs side by side.
    """
    words, spelled = ids.split(MAX_LENGTH, 1)
    clips = [networks[name](words, output_hidden_states=True) for name in CLIPS]
    t5 = networks["text_encoder_3"]
    padded = F.pad(spelled, (0, T5_LENGTH - MAX_LENGTH), value=t5.config.pad_token_id)
    states = torch.cat([clip.hidden_states[-2] for clip in clips], 2)
    return torch.cat([states, t5(padded)[0]], 1), torch.cat([clip.text_embeds for clip in clips], 1)


@dataclass
class Flow(Architecture):
    """A rectified flow.

    T5 reads the caption. The CLIPs are as small as they can be, because the pipeline wants them: their pooled
    states say to every block what the image shows.

    Attributes:
        layers: see `new_flow_transformer`.
        heads: see `new_flow_transformer`.
    """

    layers: int = 6
    heads: int = 6

    pipeline_class, learning_rate = StableDiffusion3Pipeline, 6e-4
    networks = {  # noqa: RUF012
        "transformer": SD3Transformer2DModel,
        **dict.fromkeys(CLIPS, CLIPTextModelWithProjection),
        "text_encoder_3": T5EncoderModel,
    }

    def __post_init__(self) -> None:
        clip = build_tokenizer()
        self.tokenizers = {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": build_t5_tokenizer()}

    def new(self) -> Networks:
        """See `Architecture.new`. The pipeline reads CLIP's states before its last layer."""
        sizes = clip_config(self.tokenizers["tokenizer"], width=TEXT_WIDTH // 2, layers=2)
        return {
            "transformer": new_flow_transformer(self.layers, self.heads),
            **{name: CLIPTextModelWithProjection(sizes) for name in CLIPS},
            "text_encoder_3": new_t5_encoder(self.tokenizers["tokenizer_3"]),
        }

    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """See `Architecture.tokens`: (N, 48), 24 tokens of CLIP and 24 of T5."""
        return torch.cat([tokenize(self.tokenizers[n], prompts) for n in ("tokenizer", "tokenizer_3")], 1)

    def predict(
        self,
        networks: Networks,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        ids: torch.Tensor,
        source: torch.Tensor,
    ) -> torch.Tensor:
        """See `Architecture.predict`: v of the flow."""
        states, pooled = encode_text(networks, ids[:, 0])
        return networks["transformer"](
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Euler's steps along the flow; see `SHIFT`."""
        return FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    def pipeline(self, vae: AutoencoderKL, networks: Networks) -> StableDiffusion3Pipeline:
        """See `Architecture.pipeline`. This pipeline adds the VAE's shift, so the VAE must name it."""
        vae.register_to_config(shift_factor=0.0)
        return super().pipeline(vae, networks)

    def fractions(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """See `Architecture.fractions`: logit-normal with mean 0 and variance 1, as in the paper."""
        return torch.randn(count, generator=generator, device=generator.device).sigmoid()
