"""Complete, tiny pipelines of real classes with random weights, built offline."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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


def one_level_pipeline(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """The tiny pipeline with a U-Net of half the blocks: three transformers and three residual blocks."""
    pipeline = tiny_pipeline(prediction_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {
            **pipeline.unet.config,
            "block_out_channels": (16,),
            "mid_block_type": None,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
        }
        del config["_use_default_values"]  # else diffusers takes its own default for what was one
        pipeline.unet = UNet2DConditionModel.from_config(config)
    return pipeline


def tiny_clip(
    kind: type, tokenizer: CLIPTokenizer, width: int
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP of either class, whose states and projection have this width."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def tiny_vae(channels: int = 4, **options) -> AutoencoderKL:
    """A VAE of 2 pixels a latent."""
    return AutoencoderKL(
        block_out_channels=(8,) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **options,
    ).eval()


def tiny_flow_vae(scaling: float, shift: float) -> AutoencoderKL:
    """The same as rectified flows have it: 16 channels, shifted and scaled."""
    return tiny_vae(
        16, scaling_factor=scaling, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False
    )


def tiny_sdxl(force_zeros: bool = True, seed: int = 0) -> StableDiffusionXLPipeline:
    """Build a `StableDiffusionXLPipeline` with the published scheduler, 8x8 latents and 16x16 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = tiny_tokenizer(32), tiny_tokenizer(32)
        second.pad_token = "!"
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(1, 2),
            cross_attention_dim=16 + 24,
            use_linear_projection=True,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        )
        return StableDiffusionXLPipeline(
            vae=tiny_vae(scaling_factor=0.13025),
            text_encoder=tiny_clip(CLIPTextModel, first, 16),
            text_encoder_2=tiny_clip(CLIPTextModelWithProjection, second, 24),
            tokenizer=first,
            tokenizer_2=second,
            unet=unet.eval(),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                timestep_spacing="leading",
            ),
            force_zeros_for_empty_prompt=force_zeros,
            add_watermarker=False,
        )


def tiny_t5(width: int, model_max_length: int = 512) -> dict:
    """A T5 encoder whose states have this width, and its tokenizer: one token a character."""
    letters = [(chr(i), -3.0) for i in range(33, 127)]
    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    config = T5Config(vocab_size=len(tokens), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    tokenizer = T5Tokenizer(vocab=tokens, extra_ids=0, model_max_length=model_max_length)
    return {"encoder": T5EncoderModel(config).eval(), "tokenizer": tokenizer}


def tiny_sd3(seed: int = 0, **options) -> StableDiffusion3Pipeline:
    """Build a `StableDiffusion3Pipeline` with the published scheduler, 8x8 latents and 16x16 images.

    Args:
        seed: of the weights.
        **options: of the transformer, as SD 3.5 has them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = tiny_tokenizer(32), tiny_tokenizer(32)
        second.pad_token = "!"
        t5 = tiny_t5(64)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=16,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=16,
            **options,
        )
        return StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_flow_vae(1.5305, 0.0609),
            text_encoder=tiny_clip(CLIPTextModelWithProjection, first, 16),
            tokenizer=first,
            text_encoder_2=tiny_clip(CLIPTextModelWithProjection, second, 24),
            tokenizer_2=second,
            text_encoder_3=t5["encoder"],
            tokenizer_3=t5["tokenizer"],
        )


def mark_student(folder, pipeline=None, alpha_T_squared: float | None = None) -> None:
    """Write the `student.json` of a student of a pipeline, by default of the tiny one, into a folder."""
    pipeline = pipeline or tiny_pipeline()
    Student.of(network_of(pipeline), pipeline.scheduler, alpha_T_squared).write(folder)


def tiny_pixart() -> PixArtAlphaPipeline:
    """Build a `PixArtAlphaPipeline` of the published kind of schedule, with a T5 of one token a letter."""
    letters = [(letter, -12.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    torch.manual_seed(0)
    return PixArtAlphaPipeline(
        tokenizer=T5Tokenizer(vocab=tokens, extra_ids=0, model_max_length=120),
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=len(tokens), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ).eval(),
        vae=AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=64,
        ),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            sample_size=8,
            patch_size=2,
            caption_channels=32,
            norm_type="ada_norm_single",
        ),
        scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    )
