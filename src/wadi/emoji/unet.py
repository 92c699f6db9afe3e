"""The built-in architecture of the emoji teacher: Stable Diffusion's U-Net with CLIP's text encoder."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from wadi.emoji.architecture import Architecture, Networks
from wadi.emoji.tokenizer import MAX_LENGTH, build_tokenizer, tokenize


def new_unet() -> UNet2DConditionModel:
    """A U-Net with random weights: 7.75 M parameters, three levels with cross-attention."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 3, 5),
        use_linear_projection=True,
    )


def clip_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    """Sizes of a small CLIP text encoder for 24 tokens.

    Args:
        tokenizer: of the emoji world.
        width: of the states and of the projection, a multiple of 32.
        layers: their number.
    """
    end = tokenizer.eos_token_id
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=end,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder with random weights: three layers, 128 wide, 24 tokens."""
    return CLIPTextModel(clip_config(tokenizer, width=128, layers=3))


def take_states(states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Take the state of each token from one of V captions.

    Args:
        states: (N V, L, D) states of V captions for each latent.
        source: (N, L) int64, the caption whose state is taken.

    Returns:
        (N, L, D).
    """
    states = states.unflatten(0, (len(source), -1))
    return states.take_along_dim(source[:, None, :, None], 1)[:, 0]


class UNet(Architecture):
    """A U-Net that reads all 24 tokens of CLIP, padding included."""

    pipeline_class, learning_rate, recombines = StableDiffusionPipeline, 1e-3, True
    networks = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}  # noqa: RUF012
    absent = ("safety_checker", "feature_extractor")

    def __init__(self) -> None:
        self.tokenizers = {"tokenizer": build_tokenizer()}

    def new(self) -> Networks:
        """See `Architecture.new`."""
        return {"unet": new_unet(), "text_encoder": new_text_encoder(self.tokenizers["tokenizer"])}

    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """See `Architecture.tokens`: (N, 24)."""
        return tokenize(self.tokenizers["tokenizer"], prompts)

    def predict(
        self,
        networks: Networks,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        ids: torch.Tensor,
        source: torch.Tensor,
    ) -> torch.Tensor:
        """See `Architecture.predict`."""
        states = networks["text_encoder"](ids.flatten(0, 1))[0]
        return networks["unet"](noisy, timesteps, take_states(states, source), return_dict=False)[0]
