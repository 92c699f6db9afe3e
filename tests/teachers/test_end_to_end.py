"""A single file with a LoRA through the commands: train, resume, export, generate."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tests.distill.test_resume import config
from tests.teachers.loras import random_lora, save_diffusers
from tests.teachers.original import save_original
from tests.tiny import PROMPTS, tiny_pipeline
from wadi import cli
from wadi.distill import DistillConfig, distill
from wadi.errors import WadiError, WadiWarning
from wadi.identity import files_digest
from wadi.onestep import Student, StudentPipeline, load_pipeline
from wadi.teachers import prepare_teacher

pytestmark = pytest.mark.filterwarnings("ignore:.*is converted once:wadi.errors.WadiWarning")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A run of two updates whose teacher is a file with a LoRA."""
    folder = tmp_path_factory.mktemp("file")
    pipeline = tiny_pipeline()
    save_original(pipeline, folder / "model.safetensors", ("vae",))
    save_diffusers(random_lora(pipeline, ("unet", "text_encoder")), folder / "lora.safetensors")
    tiny_pipeline(seed=5).save_pretrained(folder / "config")
    return config(folder / "model.safetensors", folder, "run").replace(
        teacher_config=str(folder / "config"),
        teacher_lora=str(folder / "lora.safetensors"),
        teacher_lora_scale=0.5,
        max_train_steps=2,
        student_learning_rate=3e-2,
    )


@pytest.fixture(scope="module")
def run(options):
    return distill(options)


def image(pipeline, seed=3):
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
    return pipeline(PROMPTS[0], generator=generator, **arguments).images


def test_the_student_is_merged_onto_the_teacher_with_its_lora(options, run):
    lora = Student.read(run / "adapter").lora
    assert (lora.digest, lora.scale) == (files_digest(options.model.teacher_lora), 0.5)
    assert Student.read(run / "pipeline").lora == lora
    with warnings.catch_warnings():
        warnings.simplefilter("error", WadiWarning)
        merged = StudentPipeline.from_pretrained(prepare_teacher(*options.model.teacher), run / "adapter")
    stock = StableDiffusionPipeline.from_pretrained(run / "pipeline")
    assert np.array_equal(image(stock), merged(PROMPTS[0], seed=3, output_type="np"))
    text = load_pipeline(prepare_teacher(*options.model.teacher)).text_encoder.state_dict()
    assert all(torch.equal(tensor, text[name]) for name, tensor in stock.text_encoder.state_dict().items())
    assert not any("teachers" in path.read_text() for path in (run / "pipeline").rglob("*.json"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"lora": None, "lora_scale": 1.0}, "has no LoRA"), ({"lora_scale": 1.0}, "at scale 1;")],
)
def test_a_merge_without_the_lora_is_told(changes, said, options, run):
    name, folder, lora, scale = options.model.teacher
    arguments = {"lora": lora, "lora_scale": scale} | changes
    teacher = prepare_teacher(name, folder, **arguments)
    with pytest.warns(
        WadiWarning, match=rf"adapter: the student was distilled .* at scale 0\.5, but .*{said}"
    ):
        StudentPipeline.from_pretrained(teacher, run / "adapter")


def test_a_lora_where_the_student_had_none_is_told(options, teacher_folder, tmp_path):
    plain = distill(config(teacher_folder, tmp_path, "run").replace(max_train_steps=1))
    assert "lora" not in json.loads((plain / "adapter" / "student.json").read_text())["base"]
    teacher = prepare_teacher(teacher_folder, lora=options.model.teacher_lora)
    with pytest.warns(WadiWarning, match="was distilled from a teacher with no LoRA, but .* has the LoRA"):
        StudentPipeline.from_pretrained(teacher, plain / "adapter")


def test_a_run_resumes_with_moved_files_and_refuses_others(options, run, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    moved = {
        "pretrained_model_name_or_path": shutil.copy(options.model.pretrained_model_name_or_path, tmp_path),
        "teacher_lora": shutil.copy(options.model.teacher_lora, tmp_path),
        "teacher_config": str(shutil.copytree(options.model.teacher_config, tmp_path / "moved")),
    }
    resumed = DistillConfig.of(resume_from_checkpoint=str(again), max_train_steps=3, **moved)
    distill(resumed)
    assert len((again / "metrics.jsonl").read_text().splitlines()) == 3
    other = save_diffusers(random_lora(tiny_pipeline(), ("unet",), seed=9), tmp_path / "other.safetensors")
    file = save_original(tiny_pipeline(seed=8), tmp_path / "file.safetensors")
    tiny_pipeline(seed=9).save_pretrained(tmp_path / "folder")
    for name, value in (
        ("teacher_lora", other),
        ("pretrained_model_name_or_path", file),
        ("teacher_config", tmp_path / "folder"),
    ):
        with pytest.raises(WadiError, match=r"--teacher.*: its content is not what .* was started with"):
            distill(resumed.replace(max_train_steps=4, **{name: str(value)}))
    with pytest.raises(WadiError, match=r"--teacher-lora-scale: the run was started with 0\.5"):
        distill(resumed.replace(max_train_steps=4, teacher_lora_scale=2.0))


def test_commands_take_the_same_options(options, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, folder, lora, _ = options.model.teacher
    same = ["--teacher-config", folder, "--teacher-lora", lora, "--teacher-lora-scale", "0.5"]
    assert cli.main(["export", str(run / "adapter"), "--model", name, *same, "--out", "exported"]) == 0
    exported = StableDiffusionPipeline.from_pretrained("exported")
    assert np.array_equal(image(exported), image(StableDiffusionPipeline.from_pretrained(run / "pipeline")))
    words = ["generate", PROMPTS[0], "--model", name, "--adapter", str(run / "adapter"), *same]
    assert cli.main([*words, "--seed", "3", "--out", "image.png"]) == 0
    found = np.asarray(Image.open("image.png"))
    assert np.abs(found / 255 - image(exported)[0]).max() <= 1 / 255
    words = ["prompts", "encode", "--teacher", name, *same, "--prompts", options.model.prompts]
    assert cli.main([*words, "--mixed-precision", "no"]) == 0
    assert "shards encoded now           0" in capsys.readouterr().out


def test_a_file_as_the_output_is_refused(options, run, tmp_path, capsys):
    name, folder, lora, _ = options.model.teacher
    words = ["export", str(run / "adapter"), "--model", name, "--teacher-config", folder]
    assert cli.main([*words, "--teacher-lora", lora, "--out", folder]) == 2
    assert "would be lost" in capsys.readouterr().err
