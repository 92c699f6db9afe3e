"""A LoRA of either kind of names is fused exactly, and one that does not fit is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.teachers.loras import fused, random_lora, save_diffusers, save_kohya
from tests.tiny import mark_student, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from wadi.errors import WadiError
from wadi.onestep import load_pipeline
from wadi.teachers import prepare_teacher

MODELS = {
    "sd": (tiny_pipeline, ("unet", "text_encoder")),
    "sdxl": (tiny_sdxl, ("unet", "text_encoder", "text_encoder_2")),
    "sd3": (tiny_sd3, ("transformer", "text_encoder", "text_encoder_2")),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*is converted once:wadi.errors.WadiWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a model -> its pipeline folder."""
    found = {name: tmp_path_factory.mktemp("lora") / name for name in MODELS}
    for name, folder in found.items():
        MODELS[name][0]().save_pretrained(folder)
    return found


@pytest.mark.parametrize(
    ("model", "names"),
    [("sd", "diffusers"), ("sd", "kohya"), ("sdxl", "diffusers"), ("sdxl", "kohya"), ("sd3", "diffusers")],
)
def test_every_weight_is_the_base_and_the_change(model, names, folders, tmp_path):
    make, parts = MODELS[model]
    lora = random_lora(make(), parts)
    if names == "diffusers":
        file, scale = save_diffusers(lora, tmp_path / "lora.safetensors"), 0.5
    else:  # alpha over rank is another factor
        file, scale = save_kohya(lora, tmp_path / "lora.safetensors", alpha=6), 0.5 * 6 / 2
    folder = prepare_teacher(folders[model], lora=file, lora_scale=0.5)
    made, base = load_pipeline(folder), load_pipeline(folders[model])
    for part, expected in fused(base, lora, scale).items():
        found = getattr(made, part).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=f"{part} {name}")
    assert torch.equal(made.vae.decoder.conv_in.weight, base.vae.decoder.conv_in.weight)


def test_the_alpha_in_the_header_counts(folders, tmp_path):
    lora = random_lora(tiny_pipeline(), ("unet",))
    file = save_diffusers(lora, tmp_path / "lora.safetensors")
    layers = list(lora["unet"])
    config = {"unet.r": 2, "unet.lora_alpha": 8, "unet.target_modules": layers}
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    made = load_pipeline(prepare_teacher(folders["sd"], lora=file))
    expected = fused(load_pipeline(folders["sd"]), lora, 8 / 2)["unet"]
    for name, tensor in expected.items():
        torch.testing.assert_close(made.unet.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def another_width(tensors):
    return {key: torch.cat([value, value], 1) if "lora_A" in key else value for key, value in tensors.items()}


def other_layers(tensors):
    first = "down_blocks.1.attentions.0.transformer_blocks.0"
    return {key.replace(first, "down_blocks.7.attentions.9"): value for key, value in tensors.items()}


def another_part(tensors):
    return tensors | {key.replace("unet.", "text_encoder_2."): value for key, value in tensors.items()}


def no_prefix(tensors):
    return {key.removeprefix("unet."): value for key, value in tensors.items()}


def halves(tensors):
    return {key: value for i, (key, value) in enumerate(tensors.items()) if "lora_A" in key or i > 4}


def not_finite(tensors):
    return {key: value * float("nan") for key, value in tensors.items()}


def dora(tensors):
    return tensors | {key.replace("lora_A", "dora_scale"): value for key, value in tensors.items()}


def loha(tensors):
    return {key.replace("lora_A", "hada_w1_a"): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (another_width, "does not fit the teacher"),
        (other_layers, r"\d+ of its \d+ matrices have no place .*down_blocks.7"),
        (another_part, r"\d+ of its \d+ matrices have no place .*text_encoder_2"),
        (no_prefix, r"does not fit|have no place"),
        (halves, r"does not fit|have no place"),
        (not_finite, "not finite"),
        (dora, "is a DoRA"),
        (loha, "is a LoHa"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(change, said, folders, tmp_path):
    file = save_diffusers(random_lora(tiny_pipeline(), ("unet",)), tmp_path / "good.safetensors")
    save_file({k: v.clone() for k, v in change(load_file(file)).items()}, tmp_path / "lora.safetensors")
    with pytest.raises(WadiError, match=said) as raised:
        prepare_teacher(folders["sd"], lora=tmp_path / "lora.safetensors")
    assert str(tmp_path / "lora.safetensors") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_lora_of_another_model_is_refused(folders, tmp_path):
    file = save_diffusers(random_lora(tiny_sdxl(), ("unet",)), tmp_path / "lora.safetensors")
    for model in ("sd", "sd3"):
        with pytest.raises(WadiError, match=r"lora.safetensors: .*(does not fit|have no place)"):
            prepare_teacher(folders[model], lora=file)


def test_the_names_of_kohya_for_sd3_are_refused(folders, tmp_path):
    lora = random_lora(tiny_pipeline(), ("unet",))
    with pytest.raises(WadiError, match=r"have no place in the teacher, such as lora_unet"):
        prepare_teacher(folders["sd3"], lora=save_kohya(lora, tmp_path / "lora.safetensors", alpha=2))


@pytest.mark.parametrize(("scale", "said"), [(2.0, "is for a LoRA"), (float("nan"), "a finite number")])
def test_a_scale_needs_a_lora_and_a_number(scale, said, folders):
    with pytest.raises(WadiError, match=f"--teacher-lora-scale.*{said}"):
        prepare_teacher(folders["sd"], lora_scale=scale)


def test_what_is_no_lora_is_refused(folders, tmp_path):
    (tmp_path / "lora.ckpt").write_bytes(b"")
    whole = folders["sd"] / "unet" / "diffusion_pytorch_model.safetensors"
    for file, said in (
        (tmp_path / "lora.ckpt", "can run code"),
        (tmp_path / "none.safetensors", "no such file"),
        (whole, "is not a LoRA: it holds a whole model; name it with --teacher"),
        (folders["sd"] / "vae" / whole.name, "holds only an autoencoder"),
    ):
        with pytest.raises(WadiError, match=said):
            prepare_teacher(folders["sd"], lora=file)


def test_pixart_and_students_take_no_lora(folders, tmp_path):
    lora = save_diffusers(random_lora(tiny_pipeline(), ("unet",)), tmp_path / "lora.safetensors")
    tiny_pixart().save_pretrained(tmp_path / "pixart")
    with pytest.raises(WadiError, match="diffusers cannot load a LoRA into a PixArtAlphaPipeline"):
        prepare_teacher(tmp_path / "pixart", lora=lora)
    shutil.copytree(folders["sd"], tmp_path / "student")
    mark_student(tmp_path / "student")
    with pytest.raises(WadiError, match="is a student already"):
        prepare_teacher(tmp_path / "student", lora=lora)
