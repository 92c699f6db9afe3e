"""The other architecture of the emoji teacher: PixArt-alpha's transformer with a T5 text encoder.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748); Chen et al., "PixArt-alpha"
(arXiv 2310.00426). The classes are those of diffusers and transformers; only the sizes are small.
"""

from __future__ import annotations

import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from wadi.emoji.architecture import Architecture, Networks
from wadi.emoji.tokenizer import build_t5_tokenizer, tokenize

TEXT_WIDTH = 128


def new_transformer() -> PixArtTransformer2DModel:
    """A transformer with 8.01 M parameters: 7 blocks, 256 wide, on 8 x 8 patches of 2 x 2 latents.

    It predicts noise and a learned sigma. As in DiT, the first prediction of the noise is zero.
    """
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=7,
        num_attention_heads=8,
        attention_head_dim=32,
        cross_attention_dim=256,
        caption_channels=TEXT_WIDTH,
        norm_type="ada_norm_single",
    )
    # the first half of a patch's rows is the noise; the rest, the variance, is not read, but it is not zero,
    # because adapters such as DoRA divide by the norms of rows
    torch.nn.init.zeros_(transformer.proj_out.weight.data.unflatten(0, (-1, 8))[:, :4])
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def new_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 encoder with random weights: three layers, 128 wide, without dropout as the U-Net's encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=512,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def predict_noise(
    transformer: torch.nn.Module,
    text_encoder: T5EncoderModel,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """Predict the noise as the stock pipeline does, which omits the learned sigma.

    Padding is masked in the encoder and in the cross-attention, so its length changes nothing: the pipeline
    pads to 120 tokens, and the training to 24.

    Args:
        transformer: a `PixArtTransformer2DModel`, compiled or not.
        text_encoder: its T5 encoder.
        noisy: latents (N, C, H, W).
        timesteps: (N,) int64.
        ids: (N, L) tokens.

    Returns:
        (N, C, H, W).
    """
    mask = ids != text_encoder.config.pad_token_id
    output = transformer(
        noisy,
        encoder_hidden_states=text_encoder(ids, attention_mask=mask)[0],
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]
    return output[:, : noisy.shape[1]]


class DiT(Architecture):
    """PixArt-alpha's transformer, which reads the states of T5. Its training diverged at the U-Net's rate."""

    pipeline_class, learning_rate = PixArtAlphaPipeline, 6e-4
    networks = {"transformer": PixArtTransformer2DModel, "text_encoder": T5EncoderModel}  # noqa: RUF012

    def __init__(self) -> None:
        self.tokenizers = {"tokenizer": build_t5_tokenizer()}

    def new(self) -> Networks:
        """See `Architecture.new`."""
        encoder = new_t5_encoder(self.tokenizers["tokenizer"])
        return {"transformer": new_transformer(), "text_encoder": encoder}

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
        """See `Architecture.predict`; the learned sigma is omitted."""
        return predict_noise(networks["transformer"], networks["text_encoder"], noisy, timesteps, ids[:, 0])
