"""Every command that takes a model takes a single file too, with a LoRA, and makes the same of it."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.teachers.loras import random_lora, save_diffusers
from tests.teachers.original import save_original
from tests.test_cli import run
from tests.tiny import PROMPTS, tiny_pipeline
from wadi.cli import COMMANDS
from wadi.files import load_tensors
from wadi.outputs import MARKER
from wadi.teachers import prepare_teacher

OTHERS = {"demo", "directions", "distill", "completion"}
"""Weights alone are read from any file, or the options are those of `DistillConfig`, or no model is named.
The commands of `wadi emoji` are for the built-in model."""
QUICK = {
    "image-to-image": "IMAGE --prompt cat -n 1",
    "inpaint": "IMAGE MASK --prompt cat -n 1 --candidates 1",
    "control": "IMAGE --prompt cat -n 1 --controlnet CONTROLNET --condition map",
    "generate": "cat -n 1 --adapter ADAPTER",
    "evaluate": "--captions PROMPTS --num-samples 2 --num-inference-steps 2 --spread-prompts 1"
    " --features emoji --resolution 64",
    "export": "ADAPTER",
    "extract": "--student STUDENT --rank 2",
    "directions swap": "TEACHER STUDENT --take norms",
    "import": "WEIGHTS",
    "invert": "EXAMPLES --kind subject --max-train-steps 1 --num-inference-steps 1 --initializer-token a",
    "dreambooth": "IMAGES --max-train-steps 1 --rank 2 --prior-loss-weight 0 --num-inference-steps 1"
    " --validation-prompts cat",
}
"""Options of each command. Words in capitals stand for the inputs of the tests."""
MODEL = {"extract": "--teacher", "directions swap": None}
"""The option that names the model, if it is not --model; None for a word without an option."""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in OTHERS and "emoji" not in c])
def test_whoever_takes_a_model_takes_a_file(command, capsys):
    assert run(*command.split(), "--help") == 0
    said = capsys.readouterr().out
    takes = re.search(r"--(model|teacher)\b(?!-)|\bTEACHER\b", said)
    assert bool(takes) == ("--teacher-config" in said) == ("--teacher-lora-scale" in said)
    assert bool(takes) == (command in QUICK or command == "prompts encode")


@pytest.fixture(scope="module")
def inputs(teacher_folder, student, tmp_path_factory):
    """Word of `QUICK` -> the path that it stands for."""
    from diffusers import ControlNetModel

    folder, pipeline = tmp_path_factory.mktemp("inputs"), tiny_pipeline(seed=3)
    save_original(pipeline, folder / "model.safetensors")
    save_diffusers(random_lora(pipeline, ("unet",)), folder / "lora.safetensors")
    for name in ("images", "examples"):
        (folder / name).mkdir()
        for number in range(2):
            Image.new("RGB", (16, 16), (200 * number, 90, 30)).save(folder / name / f"{number}.png")
    Image.fromarray(np.eye(16, dtype=bool)).save(folder / "mask.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32))
    controlnet.save_pretrained(folder / "controlnet")
    return {
        "FILE": folder / "model.safetensors",
        "LORA": folder / "lora.safetensors",
        "CONFIG": teacher_folder,
        "IMAGE": folder / "images" / "0.png",
        "MASK": folder / "mask.png",
        "IMAGES": folder / "images",
        "EXAMPLES": folder / "examples",
        "PROMPTS": folder / "prompts.txt",
        "CONTROLNET": folder / "controlnet",
        "ADAPTER": student / "adapter",
        "STUDENT": student / "pipeline",
        "WEIGHTS": student / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors",
    }


def tensors(file):
    return {name: tensor.numpy() for name, tensor in load_tensors(file).items()}


def written(folder):
    """The images and weights below a folder, by name."""
    readers = {".png": lambda file: np.asarray(Image.open(file)), ".safetensors": tensors}
    return {
        file.relative_to(folder).as_posix(): readers[file.suffix](file)
        for file in folder.rglob("*")
        if file.suffix in readers and file.name != MARKER
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("command", QUICK)
def test_a_file_is_the_same_as_its_folder(command, inputs, tmp_path):
    file = [inputs["FILE"], "--teacher-config", inputs["CONFIG"], "--teacher-lora", inputs["LORA"]]
    folder = [prepare_teacher(inputs["FILE"], inputs["CONFIG"], inputs["LORA"])]
    found = {}
    for name, (model, *options) in {"file": file, "folder": folder}.items():
        words = [inputs.get(word, word) for word in QUICK[command].split()]
        words = [model if word == "TEACHER" else word for word in words]
        if (option := MODEL.get(command, "--model")) is not None:
            words += [option, model]
        assert run(*command.split(), *words, *options, "--out", tmp_path / name) == 0
        found[name] = written(tmp_path / name)
    assert found["file"].keys() == found["folder"].keys() != set()
    for name, content in found["folder"].items():
        np.testing.assert_equal(found["file"][name], content)
