"""Tiny pipelines of the rectified flows after Stable Diffusion 3, of real classes with random weights."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from encoders import gemma_tokenizer, qwen_tokenizer
from transformers import (
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.tiny import tiny_clip, tiny_flow_vae, tiny_t5, tiny_tokenizer

FLUX_SHIFT = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""What FLUX.1 dev's scheduler has."""


def tiny_flux(dev: bool = True, seed: int = 0) -> FluxPipeline:
    """Build a `FluxPipeline` of 2 pixels a latent with the published scheduler.

    Args:
        dev: whether the network takes the guidance as an input; without it, the pipeline is schnell's.
        seed: of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, t5 = tiny_tokenizer(32), tiny_t5(32)
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(4, 4, 8),
        )
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**(FLUX_SHIFT if dev else {"shift": 1.0})),
            vae=tiny_flow_vae(0.3611, 0.1159),
            text_encoder=tiny_clip(CLIPTextModel, tokenizer, 16),
            tokenizer=tokenizer,
            text_encoder_2=t5["encoder"],
            tokenizer_2=t5["tokenizer"],
            transformer=transformer.eval(),
        )


def tiny_sana(seed: int = 0) -> SanaPipeline:
    """Build a `SanaPipeline` with the published scheduler, 2x2 latents and 64x64 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = gemma_tokenizer()
        config = Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=2048,
        )
        transformer = SanaTransformer2DModel(
            in_channels=32,
            out_channels=32,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=2,
        )
        widths, kinds = (8, 8, 8, 8, 16, 16), ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
        vae = AutoencoderDC(
            latent_channels=32,
            attention_head_dim=8,
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6,
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
            encoder_out_shortcut=False,
            decoder_in_shortcut=False,
        )
        return SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=Gemma2Model(config).eval(),
            vae=vae.eval(),
            transformer=transformer.eval(),
            scheduler=DPMSolverMultistepScheduler(
                flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
            ),
        )


def tiny_qwen(kind: type, layers: int, tokenizer: Qwen2Tokenizer) -> Qwen3Model | Qwen3ForCausalLM:
    """A Qwen3 of either class, whose states have 16 numbers."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
    )
    return kind(config).eval()


def tiny_klein(is_distilled: bool = False, seed: int = 0) -> Flux2KleinPipeline:
    """Build a `Flux2KleinPipeline` of 4 pixels a latent with FLUX.1's scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        transformer = Flux2Transformer2DModel(
            in_channels=128,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=(8,) * 2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=32,
        )
        vae.bn.running_mean.normal_(0, 0.1)
        vae.bn.running_var.uniform_(0.5, 3)
        return Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**FLUX_SHIFT),
            vae=vae.eval(),
            text_encoder=tiny_qwen(Qwen3ForCausalLM, 28, tokenizer),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
            is_distilled=is_distilled,
        )


def tiny_z_image(seed: int = 0) -> ZImagePipeline:
    """Build a `ZImagePipeline` of 2 pixels a latent with the published scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        transformer = ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 8],
            axes_lens=[1536, 512, 512],
        )
        torch.nn.init.normal_(transformer.x_pad_token)
        torch.nn.init.normal_(transformer.cap_pad_token)
        return ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_flow_vae(0.3611, 0.1159),
            text_encoder=tiny_qwen(Qwen3Model, 3, tokenizer),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )


def tiny_qwen_image(seed: int = 0) -> QwenImagePipeline:
    """Build a `QwenImagePipeline` of 8 pixels a latent with the published scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        }
        vision = {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        }
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, **{name: i for i, name in enumerate(ids)}
        )
        transformer = QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        )
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=1.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                base_image_seq_len=256,
                max_image_seq_len=8192,
                shift_terminal=0.02,
                time_shift_type="exponential",
            ),
            vae=AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval(),
            text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )
