"""Presets and ranks are compared with the teacher before anything is trained."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from wadi import cli
from wadi.backbones import fake_config, student_config
from wadi.distill import PRESETS, DistillConfig
from wadi.distill.checks import (
    check_preset,
    check_preset_name,
    check_rank,
    check_ranks,
    free_memory,
    layer_sizes,
)
from wadi.distill.presets import FITS
from wadi.errors import WadiError, WadiWarning
from wadi.onestep.student import network_of

TEACHERS = {
    ("StableDiffusionPipeline", "epsilon"): tiny_pipeline,
    ("StableDiffusionPipeline", "v_prediction"): lambda: tiny_pipeline("v_prediction"),
    ("StableDiffusionXLPipeline", "epsilon"): tiny_sdxl,
    ("PixArtAlphaPipeline", "epsilon"): tiny_pixart,
    ("StableDiffusion3Pipeline", "flow_prediction"): tiny_sd3,
}


@pytest.mark.parametrize(("pixels", "nearest"), [(128, "emoji-flow"), (512, "sd3-medium")])
def test_the_nearest_size_is_a_ratio(pixels, nearest):
    pipeline = tiny_sd3()
    pipeline.transformer.register_to_config(sample_size=pixels // 2)
    config = PRESETS["sd35-large" if pixels < 512 else "emoji-flow"]
    with pytest.warns(WadiWarning, match=f"for that would be --preset {nearest}"):
        check_preset(config.replace(pretrained_model_name_or_path="mine"), pipeline)


@pytest.fixture(scope="module")
def teachers():
    """Class and prediction -> a pipeline; read only."""
    return {kind: build() for kind, build in TEACHERS.items()}


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_for_its_kind_of_teacher(preset, kind, teachers):
    """The line that refuses names a preset that is taken; another size is told."""
    pipeline, fit = teachers[kind], FITS[preset]
    config = PRESETS[preset].replace(pretrained_model_name_or_path="mine")
    if (fit.pipeline, fit.prediction) == kind:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            check_preset(config, pipeline)
        side = pipeline.vae_scale_factor * network_of(pipeline).config.sample_size
        line = f"--preset {preset}: is for images of {fit.resolution} pixels a side"
        assert [line in str(one.message) for one in told] == ([] if side == fit.resolution else [True])
        return
    with pytest.raises(WadiError, match=f"--preset {preset}: is for a .*; use --preset ") as error:
        check_preset(config, pipeline)
    right = FITS[str(error.value).split()[-1]]
    assert (right.pipeline, right.prediction) == kind


def test_without_a_preset_all_teachers_are_taken():
    for teacher in TEACHERS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_preset(DistillConfig.of(pretrained_model_name_or_path="mine"), teacher())


def test_every_preset_knows_its_teachers():
    assert FITS.keys() == PRESETS.keys()
    assert all(config.model.preset == name for name, config in PRESETS.items())
    with pytest.raises(WadiError, match="--preset: must be none or one of"):
        check_preset_name("sd16")


def test_alpha_for_a_v_model_is_told():
    config = DistillConfig.of(pretrained_model_name_or_path="mine", alpha_T_squared=0.0047)
    with pytest.warns(WadiWarning, match="--alpha-T-squared 0.0047: is unusual for mine"):
        check_preset(config, tiny_pipeline("v_prediction"))


@pytest.mark.parametrize("preset", ["none", "sd35-medium"])
def test_a_flow_takes_no_alpha(preset):
    config = DistillConfig.of(preset=preset, pretrained_model_name_or_path="mine", alpha_T_squared=0.0047)
    with pytest.raises(WadiError, match="the model is a rectified flow, whose last alpha is 0; omit it"):
        check_preset(config, tiny_sd3())


@pytest.mark.parametrize("preset", ["pixart-512", "sd21"])
def test_the_command_refuses_it_and_leaves_nothing(preset, teacher_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    arguments = ["--teacher", teacher_folder, "--prompts", tmp_path / "prompts.txt"]
    command = [
        "distill",
        "--preset",
        preset,
        *arguments,
        "--mixed-precision",
        "no",
        "--out",
        tmp_path / "run",
    ]
    assert cli.main([*map(str, command)]) == 2
    assert f"wadi: error: --preset {preset}: is for a" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- ranks ---


@given(
    r=st.integers(-3, 40),
    layers=st.lists(st.tuples(st.integers(2, 40), st.integers(2, 80)), min_size=1),
    turned=st.booleans(),
)
def test_a_rank_is_taken_where_a_layer_can_use_it(r, layers, turned):
    """A rank that is taken is the rank of some layer's matrix of angles, or of LoRA's change."""
    matrices = [torch.empty(out, fan_in // 2 if turned else fan_in) for out, fan_in in layers]
    if 1 <= r <= max(min(matrix.shape) for matrix in matrices):
        check_rank("--rank", r, layers, turned)
    else:
        with pytest.raises(WadiError, match=f"--rank {r}: must be at least 1, and at most"):
            check_rank("--rank", r, layers, turned)


def configs(network, student_rank=4, fake_rank=2):
    return student_config(network, student_rank), fake_config(network, fake_rank)


@pytest.mark.parametrize(
    ("option", "ranks"),
    [
        ("--student-rank 100000", {"student_rank": 100_000}),
        ("--fake-rank 100000", {"fake_rank": 100_000}),
    ],
)
def test_a_rank_beyond_every_layer_names_its_option(option, ranks):
    network = tiny_pipeline().unet
    with pytest.raises(WadiError, match=f"{option}: must be at least 1, and at most"):
        check_ranks(DistillConfig(), *configs(network, **ranks), network, 2**60)


def test_memory_is_that_of_the_parameters():
    """What is said to be needed is what the adapters have, counted by PEFT, times the copies."""
    from peft import get_peft_model

    counts = []
    for index in range(2):
        network = tiny_pipeline().unet
        adapted = get_peft_model(network, configs(tiny_pipeline().unet)[index])
        counts.append(sum(p.numel() for name, p in adapted.named_parameters() if "lorad_" in name))
    needed = 4 * (5 * counts[0] + 4 * counts[1])
    network = tiny_pipeline().unet
    check_ranks(DistillConfig(), *configs(network), network, needed)
    with pytest.raises(WadiError, match="--student-rank: the adapters and their optimizers need"):
        check_ranks(DistillConfig(), *configs(network), network, needed - 1)


def test_sizes_and_free_memory():
    unet = tiny_pipeline().unet
    assert layer_sizes(unet, ["conv_in", "time_embedding.linear_1", "conv_act"]) == {
        "conv_in": (16, 36),
        "time_embedding.linear_1": (64, 16),
    }
    assert 2**20 < free_memory(torch.device("cpu")) < 2**63


def test_extract_refuses_a_rank_beyond_every_layer(teacher_folder, tmp_path, capsys):
    command = ["extract", "--teacher", teacher_folder, "--student", teacher_folder, "--out", tmp_path / "out"]
    for rank in (0, -1, 100_000):
        assert cli.main([*map(str, command), "--rank", str(rank)]) == 2
        assert f"--rank {rank}" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
