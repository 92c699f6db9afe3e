"""Swapped pipelines: what they hold, and that diffusers loads them."""

import dataclasses
import shutil

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

from tests.directions.cases import WEIGHTS, fine_tuned_pipeline
from tests.tiny import tiny_pipeline
from wadi import WadiError, emoji
from wadi.directions import compare_models, swap_rows
from wadi.onestep import Student, StudentPipeline


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap") / "student"
    fine_tuned_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("take", ["norms", "directions"])
@pytest.mark.parametrize("sharded", [False, True])
def test_rows_have_what_was_asked_of_either(take, sharded, teacher_folder, student, tmp_path, monkeypatch):
    if sharded:
        monkeypatch.setattr("wadi.directions.swap.SHARD_BYTES", 100_000)
    swap_rows(teacher_folder, student, take, tmp_path / "out")
    assert (len(list((tmp_path / "out" / "unet").glob("*.safetensors"))) > 1) == sharded
    before, after = tiny_pipeline().unet.state_dict(), fine_tuned_pipeline().unet.state_dict()
    found = StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet.state_dict()
    norms, directions = (before, after) if take == "norms" else (after, before)
    for key, tensor in found.items():
        if tensor.ndim < 2:
            assert torch.equal(tensor, after[key])
            continue
        rows, n, d = (state[key].flatten(1).double() for state in (found, norms, directions))
        expected = d / d.norm(dim=1, keepdim=True) * n.norm(dim=1, keepdim=True)
        assert torch.allclose(rows, expected, rtol=1e-6, atol=1e-9)


def test_rows_of_zeros_are_the_student_s(teacher_folder, tmp_path):
    pipeline = fine_tuned_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_in.weight[2] = 0
    pipeline.save_pretrained(tmp_path / "student")
    for take in ("norms", "directions"):
        swap_rows(teacher_folder, tmp_path / "student", take, tmp_path / take)
        weight = StableDiffusionPipeline.from_pretrained(tmp_path / take).unet.conv_in.weight
        assert not weight[2].any()


def test_the_norms_of_the_emoji_student_are_its_teacher_s(tmp_path):
    """A LoRaD student: taking the norms changes nothing, taking the directions leaves nothing."""
    teacher, student = emoji.teacher_folder(), emoji.student_folder()
    for take, same in (("norms", student), ("directions", teacher)):
        swap_rows(teacher, student, take, tmp_path / take)
        layers = compare_models(tmp_path / take, same, base=teacher).layers
        assert max(layer.size for layer in layers) < 1e-6
    assert StudentPipeline.from_pretrained(tmp_path / "norms")("a panda", seed=0)[0].size == (64, 64)
    assert LCMScheduler.load_config(tmp_path / "norms" / "scheduler")["_class_name"] == "LCMScheduler"


def test_the_rest_of_the_pipeline_of_a_file_is_the_teacher_s(teacher_folder, student, tmp_path):
    shutil.copy(student / "unet" / WEIGHTS, tmp_path / "student.safetensors")
    swap_rows(
        teacher_folder, tmp_path / "student.safetensors", "norms", tmp_path / "out", dtype=torch.float16
    )
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float16)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    text, own = (dict(p.text_encoder.named_parameters()) for p in (pipeline, tiny_pipeline()))
    assert all(torch.equal(text[key], own[key].half()) for key in own)


def test_alpha_T_of_an_adapter_goes_with_it(tmp_path):
    shutil.copytree(emoji.student_folder(), tmp_path / "student")
    record = dataclasses.replace(Student.read(tmp_path / "student"), alpha_T_squared=0.01)
    record.write(tmp_path / "student")
    swap_rows(emoji.teacher_folder(), tmp_path / "student", "norms", tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert float(pipeline.scheduler.alphas_cumprod[-1]) == pytest.approx(0.01)
    assert Student.read(tmp_path / "out") == record


def test_nothing_is_left_of_a_failure(teacher_folder, student, tmp_path, monkeypatch):
    with pytest.raises(WadiError, match="which is read"):
        swap_rows(teacher_folder, student, "norms", student)
    with pytest.raises(WadiError, match="a part of one; name"):
        swap_rows(teacher_folder / "unet", student / "unet", "norms", tmp_path / "out")

    def fail(*arguments):
        raise WadiError("full")

    monkeypatch.setattr("wadi.directions.swap.save_tensors", fail)
    with pytest.raises(WadiError, match="full"):
        swap_rows(teacher_folder, student, "norms", tmp_path / "out")
    assert not list(tmp_path.iterdir())
