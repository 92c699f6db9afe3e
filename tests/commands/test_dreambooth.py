"""`wadi dreambooth` on the built-in model, and what it makes used by the other commands."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.teachers.loras import random_lora, save_diffusers
from wadi import emoji
from wadi.cli import main
from wadi.commands.dreambooth import SubjectConfig, of_resumed_run, with_teacher_file
from wadi.commands.teacher_file import TeacherFile
from wadi.emoji import dreambooth
from wadi.emoji.dreambooth import with_built_in, word_of
from wadi.emoji.subject import examples_folder
from wadi.errors import WadiError
from wadi.files import load_tensors, read_json, write_json
from wadi.onestep import StudentPipeline, load_pipeline

QUICK = ["--max-train-steps", "2", "--train-batch-size", "1", "--num-class-images", "2", "--device", "cpu"]
QUICK += ["--num-inference-steps", "2", "--samples", "2", "--rank", "2", "--learning-rate", "0.01"]
QUICK += ["--validation-prompts", "a zwx", "a cat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two updates on the shipped pictures: enough to turn something, not to learn anything."""
    folder = tmp_path_factory.mktemp("dreambooth") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreambooth, "VARIATIONS", 2)
        patch.setattr(dreambooth, "BEFORE", 1)
        patch.setattr(dreambooth, "NAMES", dreambooth.NAMES[::6])
        assert main(["dreambooth", str(examples_folder()), "--out", str(folder), *QUICK]) == 0
    return folder


def test_the_run_folder_is_complete(run):
    picture = Image.open(run / "before-after.png")
    assert picture.width > 8 * 128
    assert picture.height > 2 * 128
    figures = read_json(run / "figures.json")
    assert {name.rsplit("_subject")[0] for name in figures if "subject" in name} == {
        "teacher_before",
        "teacher",
        "student_before",
        "student",
    }
    assert len(figures) == 12
    assert all(0 <= value <= 1 for value in figures.values())
    # nothing was learned, so nothing is recognised, and what the student knows it still knows
    assert figures["student_before_subject_recognised"] <= 0.5
    assert figures["student_other_prompts_right"] >= 0.5


def test_the_subject_is_stacked_on_the_built_in_student(run, tmp_path, capsys):
    out = tmp_path / "a.png"
    subject = ["--subject-adapter", str(run / "adapter")]
    assert main(["generate", "a zwx", *subject, "--seed", "3", "--out", str(out), "--device", "cpu"]) == 0
    adapters = [emoji.student_folder(), run / "adapter"]
    stacked = StudentPipeline.from_pretrained(emoji.teacher_folder(), adapters)
    alone = StudentPipeline.from_pretrained(emoji.teacher_folder(), adapters[0])
    shown = np.asarray(Image.open(out))
    assert np.array_equal(shown, np.asarray(stacked("a zwx", seed=3)[0]))
    assert not np.array_equal(shown, np.asarray(alone("a zwx", seed=3)[0]))
    whole = ["--dtype", "float32"]  # the teacher's files are in half precision
    assert main(["export", str(adapters[0]), *subject, *whole, "--out", str(tmp_path / "exported")]) == 0
    exported = StudentPipeline.from_pretrained(tmp_path / "exported")
    assert np.array_equal(shown, np.asarray(exported("a zwx", seed=3)[0]))


def test_a_finished_run_is_not_replaced(run, capsys):
    before = load_tensors(run / "adapter" / "adapter_model.safetensors")
    assert main(["dreambooth", str(examples_folder()), "--out", str(run), *QUICK]) == 2
    assert "was written by wadi dreambooth before; go on with --resume" in capsys.readouterr().err
    after = load_tensors(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_has_its_own_model(tmp_path):
    options = dataclasses.asdict(SubjectConfig(examples_folder(), tmp_path))
    write_json(tmp_path / "config.json", options | {"pretrained_model_name_or_path": "mine"})
    resumed = SubjectConfig(examples_folder(), tmp_path, resume=True)
    assert of_resumed_run(resumed).pretrained_model_name_or_path == "mine"
    teacher = str(emoji.teacher_folder())
    write_json(tmp_path / "config.json", options | {"pretrained_model_name_or_path": teacher})
    assert of_resumed_run(resumed).pretrained_model_name_or_path is None


def test_a_lora_is_fused_once_also_when_a_run_is_resumed(tmp_path):
    """A resumed run that names the LoRA again has the model of the first, with no second LoRA in it."""
    pipeline = load_pipeline(emoji.teacher_folder())
    save_diffusers(random_lora(pipeline, ("unet",)), tmp_path / "lora.safetensors")
    lora = TeacherFile(teacher_lora=str(tmp_path / "lora.safetensors"))
    run = tmp_path / "run"
    first = with_teacher_file(SubjectConfig(examples_folder(), run, teacher_file=lora))
    run.mkdir()
    write_json(run / "config.json", dataclasses.asdict(first))
    for named in (lora, TeacherFile()):
        again = SubjectConfig(examples_folder(), run, resume=True, teacher_file=named)
        model = of_resumed_run(with_teacher_file(again)).pretrained_model_name_or_path
        assert model == first.pretrained_model_name_or_path


def test_a_resumed_run_has_its_own_options_where_none_are_given(tmp_path):
    first = SubjectConfig(
        examples_folder(),
        tmp_path,
        method="lora",
        learning_rate=1e-3,
        guidance_scale=1.5,
        train_text_encoder=False,
        instance_prompt="a blick",
    )
    write_json(tmp_path / "config.json", dataclasses.asdict(with_built_in(first)))
    again = with_built_in(of_resumed_run(SubjectConfig(examples_folder(), tmp_path, resume=True)))
    assert again.fingerprint() == with_built_in(first).fingerprint()
    assert (again.train_text_encoder, again.learning_rate, again.instance_prompt) == (False, 1e-3, "a blick")


def test_options_that_are_given_stay():
    config = SubjectConfig(examples_folder(), class_prompt="a dog", guidance_scale=1.0)
    filled = with_built_in(config)
    assert (filled.class_prompt, filled.prior_prompts, filled.guidance_scale) == ("a dog", None, 1.0)
    assert filled.pretrained_model_name_or_path == str(emoji.teacher_folder())
    plain = with_built_in(SubjectConfig(examples_folder()))
    assert (plain.prior_prompts, plain.guidance_scale) == (emoji.prompts_file(), 2.0)
    assert "a big zwx on a purple background" in plain.validation_prompts
    assert plain.fingerprint() == dataclasses.replace(plain, samples=3).fingerprint()
    assert plain.fingerprint() != filled.fingerprint()
    assert (plain.learning_rate, plain.train_text_encoder) == (1e-2, True)
    assert not with_built_in(SubjectConfig(examples_folder(), train_text_encoder=False)).train_text_encoder


@pytest.mark.parametrize("method", ["lorad", "lora"])
def test_defaults_are_those_that_the_experiment_chose(method):
    results = Path(__file__).parents[2] / "docs" / "results" / "dreambooth.json"
    chosen = read_json(results)["chosen"][method]
    filled = with_built_in(SubjectConfig(examples_folder(), method=method))
    assert {name: getattr(filled, name) for name in chosen} == chosen


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WadiError, match='"a" and a new word'):
        word_of("zwx")
    for arguments, told in (
        (["nowhere"], "nowhere: no such folder"),
        ([str(examples_folder()), "--instance-prompt", "zwx"], '"a" and a new word'),
        ([str(examples_folder()), "--samples", "-1"], "--samples"),
        (
            [str(examples_folder()), "--model", "nowhere", "--class-prompt", "a dog"],
            "nowhere: no such folder",
        ),
        ([str(examples_folder()), "--model", str(emoji.teacher_folder())], "--class-prompt: say what"),
    ):
        assert main(["dreambooth", *arguments]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.splitlines()[-1].startswith("wadi: error: ")
        assert not list(tmp_path.iterdir())
