"""Stable Diffusion 3: what no prompt is, and what its folders must be."""

import json

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from tests.files import edit
from tests.tiny import tiny_pipeline, tiny_sd3
from wadi import cli
from wadi.backbones import SD3Backbone, load_backbone, load_prompt_encoder
from wadi.errors import WadiError
from wadi.onestep import StudentPipeline
from wadi.onestep.loading import load_pipeline


@torch.no_grad()
def test_no_prompt_is_the_empty_one():
    pipeline = tiny_sd3()
    null = SD3Backbone(pipeline).null()
    _, states, _, pooled = pipeline.encode_prompt("a cat", None, None, device="cpu")
    assert torch.equal(null["encoder_hidden_states"], states)
    assert torch.equal(null["pooled_projections"], pooled)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, its student, an image, a mask, a folder of images, and a ControlNet of Stable Diffusion."""
    folder = tmp_path_factory.mktemp("sd3")
    tiny_sd3().save_pretrained(folder / "teacher")
    StudentPipeline(tiny_sd3()).save_pretrained(folder / "student")
    ControlNetModel.from_unet(tiny_pipeline().unet).save_pretrained(folder / "controlnet")
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "image.png")
    Image.fromarray(pixels[..., 0]).save(folder / "mask.png")
    return folder


COMMANDS = {
    "image-to-image": (
        "images/image.png --prompt cat",
        "images of images are made with a StableDiffusionPipeline",
    ),
    "inpaint": (
        "images/image.png mask.png --prompt cat",
        "images of images are made with a StableDiffusionPipeline",
    ),
    "control": (
        "images/image.png --prompt cat --condition map --controlnet controlnet",
        "steer the U-Net of a StableDiffusionPipeline",
    ),
    "invert": ("images --device cpu", "words are learned on a StableDiffusionPipeline"),
}
"""Commands for Stable Diffusion 1 and 2 alone: their arguments, and what they say."""


@pytest.mark.parametrize("model", ["teacher", "student"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_for_other_models_say_so_in_one_line(command, model, folders, monkeypatch, capsys):
    arguments, message = COMMANDS[command]
    if (command, model) == ("invert", "student"):
        message = "is a student already"
    out = "word" if command == "invert" else "out.png"
    monkeypatch.chdir(folders)
    assert cli.main([command, *arguments.split(), "--model", model, "--out", out]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wadi: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (folders / out).exists()


def test_a_subject_is_learned_and_goes_on_the_student(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    options = "--max-train-steps 1 --class-prompt dog --num-class-images 1 --num-inference-steps 1 --rank 2"
    command = ["dreambooth", "images", *options.split(), "--device", "cpu", "--learning-rate", "0.1"]
    command += ["--pretrained-model-name-or-path", "teacher", "--output-dir", str(tmp_path / "run")]
    assert cli.main(command) == 0
    plain = StudentPipeline.from_pretrained("student")("a zwx", seed=0, output_type="np")
    with_subject = StudentPipeline.from_pretrained("student", tmp_path / "run" / "adapter")
    assert not np.array_equal(with_subject("a zwx", seed=0, output_type="np"), plain)


@pytest.mark.parametrize("side", ["height", "width"])
def test_sides_end_where_the_network_has_no_places(side):
    """16 patches of 2 latents of 2 pixels."""
    pipeline = StudentPipeline(tiny_sd3())
    assert (
        pipeline("a cat", seed=0, output_type="pt", **{side: 64}).shape[-1 if side == "width" else -2] == 64
    )
    with pytest.raises(WadiError, match=f"--{side} 72: this model makes at most 64 pixels a side"):
        pipeline("a cat", seed=0, **{side: 72})


BROKEN = {
    "other T5": (
        "transformer/config.json",
        {"joint_attention_dim": 48},
        "width 48 .joint_attention_dim.*give 64",
    ),
    "other pooled": (
        "text_encoder/config.json",
        {"projection_dim": 20},
        "width 40 .pooled_projection_dim.*give 44",
    ),
    "inpainting": ("transformer/config.json", {"in_channels": 33}, "takes 33 channels and gives 16"),
    "other latents": ("vae/config.json", {"latent_channels": 4}, "different models"),
    "no size": ("transformer/config.json", {"sample_size": None}, "sample_size is None"),
    "without T5": ("model_index.json", {"text_encoder_3": [None, None]}, "lists no text_encoder_3"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_folders_that_cannot_be_used(tmp_path, kind):
    file, fields, message = BROKEN[kind]
    tiny_sd3().save_pretrained(tmp_path)
    edit(tmp_path / file, **fields)
    for loader in (load_pipeline, load_backbone, load_prompt_encoder):
        with pytest.raises(WadiError, match=message) as error:
            loader(tmp_path)
        assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_length_is_bound_in_the_pipeline_too(tmp_path):
    tiny_sd3().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    options = json.loads(file.read_text())
    options.pop("model_max_length")
    file.write_text(json.dumps(options))
    condition = load_prompt_encoder(tmp_path).encode(["a cat"])
    assert condition["encoder_hidden_states"].shape[1] == 32 + 256
