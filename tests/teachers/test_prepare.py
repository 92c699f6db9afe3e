"""A single file in the original layout becomes the pipeline folder that it was made of."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.teachers.loras import random_lora, save_diffusers
from tests.teachers.original import save_original
from tests.tiny import tiny_pipeline, tiny_sd3, tiny_sdxl
from wadi.errors import WadiError, WadiWarning
from wadi.files import write_json
from wadi.identity import files_digest, model_digest
from wadi.onestep import load_pipeline
from wadi.teachers import prepare_teacher, teacher_digests

MODELS = {
    "sd": tiny_pipeline,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd35": lambda seed=0: tiny_sd3(seed, qk_norm="rms_norm", dual_attention_layers=(0,)),
}
MORE = {
    "alphas_cumprod": torch.ones(1000),
    "model_ema.decay": torch.ones(()),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(32)[None],
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(32)[None],
    "conditioner.embedders.1.model.logit_scale": torch.ones(()),
}
"""Tensors beside the weights, as published files have them."""
PREFIX = {"sd": "cond_stage_model", "sdxl": "conditioner", "sd3": "", "sd35": ""}
pytestmark = pytest.mark.filterwarnings("ignore:.*is converted once:wadi.errors.WadiWarning")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Name of a model -> a folder of the same kind with other weights."""
    found = {name: tmp_path_factory.mktemp("config") / name for name in MODELS}
    for name, folder in found.items():
        MODELS[name](seed=5).save_pretrained(folder)
    return found


def networks(pipeline):
    parts = pipeline.components.items()
    return {name: part.state_dict() for name, part in parts if isinstance(part, torch.nn.Module)}


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model", MODELS)
def test_every_weight_comes_from_the_file(model, configs, tmp_path):
    pipeline = MODELS[model]()
    more = {
        key: value for key, value in MORE.items() if key.split(".")[0] in ("alphas_cumprod", PREFIX[model])
    }
    file = save_original(pipeline, tmp_path / "model.safetensors", **more)
    with pytest.warns(WadiWarning, match=f"{file}: is converted once"):
        folder = prepare_teacher(file, configs[model])
    made = networks(load_pipeline(folder))
    for part, expected in networks(pipeline).items():
        check_equal(made[part], expected)


@pytest.mark.parametrize(
    ("model", "lacks"),
    [("sd", ("vae",)), ("sdxl", ("text_encoder_2",)), ("sd3", ("text_encoder_3", "text_encoder", "vae"))],
)
def test_what_the_file_lacks_comes_from_the_folder(model, lacks, configs, tmp_path):
    pipeline = MODELS[model]()
    file = save_original(pipeline, tmp_path / "model.safetensors", lacks)
    made = networks(load_pipeline(prepare_teacher(file, configs[model])))
    other = networks(load_pipeline(configs[model]))
    for part, own in networks(pipeline).items():
        check_equal(made[part], other[part] if part in lacks else own)
    bare = tmp_path / "bare"
    shutil.copytree(configs[model], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(WadiError, match=rf"model.safetensors: holds no ({'|'.join(lacks)}), and .*bare"):
        prepare_teacher(file, bare)
    whole = save_original(pipeline, tmp_path / "whole.safetensors")
    for part, own in networks(load_pipeline(prepare_teacher(whole, bare))).items():
        check_equal(own, networks(pipeline)[part])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_and_quarter_precision(dtype, configs, tmp_path):
    pipeline = tiny_pipeline()
    file = save_original(pipeline, tmp_path / "model.safetensors", dtype=dtype)
    made = load_pipeline(prepare_teacher(file, configs["sd"]))
    check_equal(
        made.unet.state_dict(), {k: v.to(dtype).float() for k, v in pipeline.unet.state_dict().items()}
    )


def renamed(file, target, rename):
    save_file({rename(key): value for key, value in load_file(file).items()}, target)
    return target


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("model."),
        lambda key: key.removeprefix("model.diffusion_model."),
        lambda key: key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
        lambda key: key.replace("first_stage_model.", "vae."),
    ],
)
def test_other_prefixes(rename, configs, tmp_path):
    pipeline = tiny_pipeline()
    file = renamed(save_original(pipeline, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", rename)
    made = networks(load_pipeline(prepare_teacher(file, configs["sd"])))
    for part, expected in networks(pipeline).items():
        check_equal(made[part], expected)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "unet."])
def test_a_file_with_the_names_of_diffusers(prefix, configs, tmp_path):
    pipeline = tiny_sdxl()
    save_file({prefix + key: v for key, v in pipeline.unet.state_dict().items()}, tmp_path / "m.safetensors")
    made = load_pipeline(prepare_teacher(tmp_path / "m.safetensors", configs["sdxl"]))
    check_equal(made.unet.state_dict(), pipeline.unet.state_dict())


def test_a_file_of_another_kind_is_refused_before_weights_are_read(configs, tmp_path):
    file = save_original(tiny_pipeline(), tmp_path / "model.safetensors")
    for model in ("sdxl", "sd3"):
        with pytest.raises(WadiError, match=rf"model.safetensors: does not fit .*{model}.*--teacher-config"):
            prepare_teacher(file, configs[model])
    other = save_original(tiny_pipeline(channels=(8, 16)), tmp_path / "small.safetensors")
    with pytest.raises(WadiError, match=r"\d+ weights of another shape, such as conv_in.weight"):
        prepare_teacher(other, configs["sd"])
    tensors = load_file(file)
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(WadiError, match=r"1 weights missing, such as conv_out\.bias"):
        prepare_teacher(tmp_path / "damaged.safetensors", configs["sd"])


@pytest.mark.parametrize("key", ["model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias"])
def test_numbers_that_are_not_finite_are_refused(key, configs, tmp_path):
    file = save_original(tiny_pipeline(), tmp_path / "model.safetensors")
    save_file({k: v * float("nan") if k == key else v for k, v in load_file(file).items()}, file)
    with pytest.raises(WadiError, match=r"model.safetensors: the weight .* is not finite"):
        prepare_teacher(file, configs["sd"])


@pytest.mark.parametrize(
    ("mark", "option", "value"),
    [("v_pred", "prediction_type", "v_prediction"), ("ztsnr", "rescale_betas_zero_snr", True)],
)
def test_a_mark_of_the_schedule_needs_such_a_scheduler(mark, option, value, configs, tmp_path):
    file = save_original(tiny_sdxl(), tmp_path / "model.safetensors", **{mark: torch.ones(())})
    with pytest.raises(WadiError, match=rf"holds the mark {mark}.*{option}"):
        prepare_teacher(file, configs["sdxl"])
    shutil.copytree(configs["sdxl"], tmp_path / "fitting")
    scheduler = tmp_path / "fitting" / "scheduler" / "scheduler_config.json"
    write_json(scheduler, json.loads(scheduler.read_text()) | {option: value})
    assert load_pipeline(prepare_teacher(file, tmp_path / "fitting")).scheduler.config[option] == value


def test_without_configurations_and_hub_one_line_says_what_is_needed(tmp_path):
    file = save_original(tiny_pipeline(), tmp_path / "model.safetensors")
    with pytest.raises(WadiError, match=r"single file.*stable-diffusion-v1-5.*--teacher-config") as raised:
        prepare_teacher(file)
    assert "\n" not in str(raised.value)


def test_a_configuration_is_for_a_single_file(configs, tmp_path):
    with pytest.raises(WadiError, match=r"--teacher-config .* is for a single file"):
        prepare_teacher(configs["sd"], configs["sd"])
    file = save_original(tiny_pipeline(), tmp_path / "model.safetensors")
    with pytest.raises(WadiError, match=r"--teacher-config .* is a file"):
        prepare_teacher(file, file)


def test_a_folder_alone_stays_as_it_is(configs):
    assert prepare_teacher(configs["sd"]) == str(configs["sd"])
    assert prepare_teacher("owner/name") == "owner/name"


def test_the_folder_is_made_once_and_again_when_its_links_are_broken(configs, tmp_path, recwarn):
    file = save_original(tiny_pipeline(), tmp_path / "model.safetensors", ("vae",))
    shutil.copytree(configs["sd"], tmp_path / "old")
    folder = Path(prepare_teacher(file, tmp_path / "old"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    recwarn.clear()
    moved = shutil.move(file, tmp_path / "other name.safetensors")
    assert prepare_teacher(moved, tmp_path / "old") == str(folder)
    assert weights.stat().st_mtime_ns == before
    assert not recwarn.list
    (tmp_path / "old").rename(tmp_path / "new")
    assert prepare_teacher(moved, tmp_path / "new") == str(folder)
    assert load_pipeline(folder).vae is not None
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        path.name for path in configs["sd"].iterdir()
    )


def test_digests_are_of_the_content(configs, tmp_path):
    pipelines, loras, found = (tiny_pipeline(), tiny_pipeline(seed=1)), [], []
    for number, pipeline in enumerate(pipelines):
        lora = save_diffusers(
            random_lora(pipeline, ("unet",), seed=number), tmp_path / f"l{number}.safetensors"
        )
        loras.append(lora)
        file = save_original(pipeline, tmp_path / f"{number}.safetensors")
        pipeline.save_pretrained(tmp_path / f"config{number}")
        named = file, tmp_path / f"config{number}", lora
        found.append(teacher_digests(prepare_teacher(*named), *named))
        moved = shutil.copy(file, tmp_path / "moved.safetensors")
        folder = prepare_teacher(moved, *named[1:])
        moved.write_bytes(b"")  # it was read already, once
        assert teacher_digests(folder, moved, *named[1:]) == found[-1]
    assert all(found[0][name] != digest for name, digest in found[1].items())
    assert found[0]["pretrained_model_name_or_path"] == files_digest(tmp_path / "0.safetensors")
    assert found[0]["teacher_lora"] == files_digest(loras[0])
    alone = teacher_digests(configs["sd"], configs["sd"])
    assert alone == {**dict.fromkeys(found[0]), "pretrained_model_name_or_path": model_digest(configs["sd"])}
