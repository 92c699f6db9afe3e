"""Parameter counts of the paper, on the real architectures, without memory (meta device)."""

import pytest
import torch
from peft import inject_adapter_in_model
from published import make_network
from torch import nn

from tests.tiny import tiny_pipeline
from wadi.backbones import BACKBONES, Backbone, fake_config, student_config

PUBLISHED = {
    # parameters and names of tensors; what a student and a fake model train: of SD and PixArt as in table 1
    # of WaDi (83.80 M, 94.43 M, 81.22 M), of the last two with ranks 64 and 32
    "sd15": (859_520_964, 686, 83_795_968, 9_378_816),
    "sd21": (865_910_724, 686, 94_429_184, 9_509_888),
    "pixart-256": (610_856_096, 603, 81_219_584, 20_127_744),
    # two micro-conditions, each embedded by two layers: 256 -> 384 -> 384
    "pixart-1024": (610_856_096 + 2 * (257 * 384 + 385 * 384), 603 + 8, 81_219_584, 20_127_744),
    "sdxl": (2_567_463_684, 1680, 128_983_040, 64_491_520),
    "sd3-medium": (2_028_328_000, 683, 92_946_432, 31_334_400),
}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_architectures_and_counts_are_the_published_ones(architecture):
    parameters, keys, *trained = PUBLISHED[architecture]
    with torch.device("meta"):
        model = make_network(architecture)
        assert model.num_parameters() == parameters
        assert len(model.state_dict()) == keys
        for preset, expected in ((student_config, trained[0]), (fake_config, trained[1])):
            inject_adapter_in_model(preset(model), model, preset.__name__)
            own = [p for name, p in model.named_parameters() if preset.__name__ in name.split(".")]
            assert sum(p.numel() for p in own) == expected


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
        model = make_network(architecture)
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
