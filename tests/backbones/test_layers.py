"""Parameter counts of the paper, on the real architectures, without memory (meta device)."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import inject_adapter_in_model
from torch import nn

from tests.tiny import tiny_pipeline
from wadi.backbones import fake_config, student_config
from wadi.lorad import LoRaDConfig

ARCHITECTURES = {
    "sd15": lambda: UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
    "sd21": lambda: UNet2DConditionModel(
        cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
    ),
    "sdxl": lambda: UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "sd3": lambda: SD3Transformer2DModel(
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    ),
    "pixart": lambda: PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        cross_attention_dim=1152,
        sample_size=32,
        patch_size=2,
        caption_channels=4096,
        norm_type="ada_norm_single",
    ),
}


@pytest.mark.parametrize(
    ("architecture", "changes", "parameters", "keys"),
    [
        ("sd15", {}, 859_520_964, 686),
        ("sd21", {}, 865_910_724, 686),
        ("sdxl", {}, 2_567_463_684, 1680),
        ("sd3", {}, 2_028_328_000, 683),
        ("pixart", {}, 610_856_096, 603),
        # two micro-conditions, each embedded by two layers: 256 -> 384 -> 384
        ("pixart", {"sample_size": 128}, 610_856_096 + 2 * (257 * 384 + 385 * 384), 603 + 8),
    ],
)
def test_the_architectures_are_the_published_ones(architecture, changes, parameters, keys):
    with torch.device("meta"):
        model = ARCHITECTURES[architecture]()
        if changes:
            model = type(model).from_config(dict(model.config) | changes)
    assert model.num_parameters() == parameters
    assert len(model.state_dict()) == keys


def count(model: nn.Module, config: LoRaDConfig) -> int:
    inject_adapter_in_model(config, model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("architecture", "student", "fake"),
    [
        ("sd15", 83_795_968, 9_378_816),  # WaDi, table 1: 83.80 M
        ("sd21", 94_429_184, 9_509_888),  # 94.43 M
        ("pixart", 81_219_584, 20_127_744),  # 81.22 M
        ("sdxl", 128_983_040, 64_491_520),  # not in the paper; 64 and 32 of 700 layers
        ("sd3", 92_946_432, 31_334_400),
    ],
)
def test_counts_of_the_paper(architecture, student, fake):
    for preset, expected in ((student_config, student), (fake_config, fake)):
        with torch.device("meta"):
            model = ARCHITECTURES[architecture]()
            assert count(model, preset(model)) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rank_is_an_option(architecture):
    with torch.device("meta"):
        models = [ARCHITECTURES[architecture]() for _ in range(2)]
        counts = [count(m, student_config(m, r=r)) for m, r in zip(models, (1, 16), strict=True)]
    assert counts[1] == 16 * counts[0]


def test_any_size_and_an_already_adapted_model():
    unet = tiny_pipeline().unet
    linear = [
        n for n, m in unet.named_modules() if isinstance(m, nn.Linear) and not n.startswith("time_embedding")
    ]
    student, fake = student_config(unet, r=2), fake_config(unet, r=3)
    assert student.target_modules == set(linear)
    inject_adapter_in_model(student, unet, "student")
    assert fake_config(unet, r=3).target_modules == fake.target_modules
    assert not [
        name for name in fake.target_modules if name.endswith(("proj_in", "proj_out", "time_emb_proj"))
    ]
    inject_adapter_in_model(fake, unet, "fake")


def test_unknown_architectures():
    for preset in (student_config, fake_config):
        with pytest.raises(ValueError, match="for a Linear, only for UNet2DConditionModel, PixArt"):
            preset(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="at least 1"):
            preset(tiny_pipeline().unet, r=0)
