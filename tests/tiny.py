"""A complete, tiny Stable Diffusion pipeline of real classes with random weights, built offline."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from wadi.onestep.student import Student, network_of

PROMPTS = ["a red cat", "a blue dog", "two green birds", "a big house", "a small car on a hill", "the sun"]


def tiny_tokenizer(model_max_length: int = 77) -> CLIPTokenizer:
    """One token a byte; every byte also ends a word."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)


def tiny_pipeline(
    prediction_type: str = "epsilon",
    channels: tuple[int, int] = (16, 32),
    model_max_length: int = 32,
    seed: int = 0,
) -> StableDiffusionPipeline:
    """Build a `StableDiffusionPipeline` with SD's noise schedule, 8x8 latents and 16x16 pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(model_max_length)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            block_out_channels=(8,) * 2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def mark_student(folder, pipeline=None, alpha_T_squared: float | None = None) -> None:
    """Write the `student.json` of a student of a pipeline, by default of the tiny one, into a folder."""
    pipeline = pipeline or tiny_pipeline()
    Student.of(network_of(pipeline), pipeline.scheduler, alpha_T_squared).write(folder)
