"""Parameter counts of the paper, on the real architectures, without memory (meta device)."""

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from peft import inject_adapter_in_model
from torch import nn

from tests.tiny import tiny_pipeline
from wadi.backbones import BACKBONES, Backbone, fake_config, student_config
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
    "sd35-medium": lambda: SD3Transformer2DModel(
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    ),
    "sd35-large": lambda: SD3Transformer2DModel(
        num_layers=38,
        attention_head_dim=64,
        num_attention_heads=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    ),
    "flux-dev": lambda: FluxTransformer2DModel(guidance_embeds=True),
    "flux-schnell": lambda: FluxTransformer2DModel(guidance_embeds=False),
    "sana-1.6b": lambda: SanaTransformer2DModel(),
    "sana-0.6b": lambda: SanaTransformer2DModel(
        num_layers=28,
        num_attention_heads=36,
        attention_head_dim=32,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    ),
    "klein-4b": lambda: Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    ),
    "klein-9b": lambda: Flux2Transformer2DModel(
        num_layers=8,
        num_single_layers=24,
        num_attention_heads=32,
        joint_attention_dim=12288,
        guidance_embeds=False,
    ),
    "z-image": lambda: ZImageTransformer2DModel(axes_lens=[1536, 512, 512]),
    "qwen-image": lambda: QwenImageTransformer2DModel(),
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


FLOWS = {
    # millions of parameters: in all, of a student and of a fake model on all layers of their patterns at rank
    # 64; the layers of the student's; and those of the last block that no gradient reaches
    "sd35-medium": (2243.2, 104.6, 70.5, 385, ["attn.add_q_proj"]),
    "sd35-large": (8056.6, 234.6, 158.3, 529, ["attn.add_q_proj"]),
    "flux-dev": (11901.4, 269.0, 194.2, 494, []),
    "flux-schnell": (11891.2, 269.0, 194.2, 494, []),
    "sana-1.6b": (1604.5, 34.4, 34.4, 160, []),
    "sana-0.6b": (591.7, 24.8, 24.8, 224, []),
    "klein-4b": (3875.5, 78.6, 78.6, 100, []),
    "klein-9b": (9078.6, 141.6, 141.6, 144, []),
    "z-image": (6154.9, 154.3, 122.6, 270, []),
    "qwen-image": (
        *(20430.4, 471.9, 318.5, 840),
        ["attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"],
    ),
}


@pytest.mark.parametrize("architecture", FLOWS)
def test_counts_of_rectified_flows(architecture):
    """Of the published sizes; counted in another way than the adapter's, r (out + in / 2) for each layer."""
    whole, student, fake, layers, dead = FLOWS[architecture]
    with torch.device("meta"):
        model = ARCHITECTURES[architecture]()
    kind = next(kind for kind in BACKBONES.values() if kind.drives(model))
    assert round(model.num_parameters() / 1e6, 1) == whole
    assert len(Backbone.layers(model, kind.student_pattern)) == layers
    for pattern, expected in ((kind.student_pattern, student), (kind.fake_pattern, fake)):
        names = Backbone.layers(model, pattern)
        turned = [model.get_submodule(name) for name in names]
        found = sum(64 * (layer.out_features + layer.in_features // 2) for layer in turned)
        assert round(found / 1e6, 1) == expected
        left_out = sorted(set(names) - set(kind.layers(model, pattern)))
        assert [name.split(".", 2)[2] for name in left_out] == dead


@pytest.mark.parametrize("architecture", ["sd15", "sdxl", "pixart"])
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
