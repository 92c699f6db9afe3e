"""From two folders to the adapter between them: tiny real pipelines."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import inject_adapter_in_model
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny import mark_student, tiny_pixart
from wadi import WadiError
from wadi.backbones import student_config
from wadi.directions import extract_adapter, swap_rows
from wadi.directions.extract import table
from wadi.lorad import load_adapter, save_adapter
from wadi.onestep import Student, StudentPipeline, export_pipeline
from wadi.onestep.scheduler import fractions

RANK = 3
UNET = "unet/diffusion_pytorch_model.safetensors"
PROMPT = "a red cat"


def random_adapter(network, folder, std=0.7):
    """Save a student's adapter of random angles, none beyond pi."""
    inject_adapter_in_model(student_config(network, RANK), network)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lorad_A" in name:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        elif "lorad_B" in name:  # as LoRaD does, but whatever other tests drew before
            torch.nn.init.xavier_uniform_(parameter, generator=generator)
    save_adapter(network, folder)


@pytest.fixture(scope="module")
def adapter(teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extract") / "adapter"
    random_adapter(StableDiffusionPipeline.from_pretrained(teacher_folder).unet, folder)
    mark_student(folder, alpha_T_squared=0.0047)
    return folder


@pytest.fixture(scope="module")
def student(teacher_folder, adapter):
    export_pipeline(teacher_folder, adapter, adapter.parent / "student")
    return adapter.parent / "student"


def merged(teacher, adapter):
    return StudentPipeline.from_pretrained(teacher, adapter).pipeline.unet.state_dict()


def update_error(teacher, adapter, student):
    """How far the merged adapter is from the student, as a share of what the student moved."""
    before, after = load_file(teacher / UNET), load_file(student / UNET)
    ours = merged(teacher, adapter)
    error = sum((ours[key] - after[key].float()).square().sum() for key in after)
    return math.sqrt(error / sum((after[key].float() - before[key].float()).square().sum() for key in after))


def test_a_lorad_student_is_found_at_its_own_rank(teacher_folder, adapter, student, tmp_path):
    extraction = extract_adapter(teacher_folder, student, tmp_path / "found", RANK)
    assert update_error(teacher_folder, tmp_path / "found", student) < 1e-5
    ours, theirs = merged(teacher_folder, tmp_path / "found"), load_file(student / UNET)
    assert max((ours[key] - theirs[key]).abs().max() for key in ours) < 1e-6
    assert extraction.explained == pytest.approx(1, abs=1e-9)
    assert extraction.ceiling == pytest.approx(1, abs=1e-9)
    assert extraction.not_adapted == 0
    assert max(layer.norm_change for layer in extraction.layers) < 1e-6
    assert Student.read(tmp_path / "found").alpha_T_squared == pytest.approx(0.0047)
    images = [
        StudentPipeline.from_pretrained(teacher_folder, folder)(PROMPT, seed=3, output_type="np")
        for folder in (adapter, tmp_path / "found")
    ]
    assert np.abs(images[0] - images[1]).max() < 1e-3
    configs = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "found", adapter)
    ]
    assert configs[0] == {**configs[1], "base_model_name_or_path": str(teacher_folder)}


def test_half_precision_files_cost_a_percent_of_the_update(teacher_folder, student, tmp_path):
    halves = []
    for folder in (teacher_folder, student):
        halves.append(tmp_path / folder.name)
        pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
        pipeline.save_pretrained(halves[-1])
    extraction = extract_adapter(*halves, tmp_path / "found", RANK)
    # files are rounded to 2^-11 of each weight, an update of most of the weight's size
    assert update_error(halves[0], tmp_path / "found", halves[1]) < 0.02
    assert extraction.ceiling > 0.9999


def test_figures_are_those_of_the_files(teacher_folder, student, tmp_path):
    """A full-weight change on top: every figure again, in float64, from what was written."""
    changed = tmp_path / "changed"
    shutil.copytree(student, changed)
    before, after = load_file(teacher_folder / UNET), load_file(student / UNET)
    generator = torch.Generator().manual_seed(2)
    for key in sorted(after):
        if not key.startswith("time_embedding"):
            after[key] += 0.02 * torch.randn(after[key].shape, generator=generator)
    save_file(after, changed / UNET)
    extraction = extract_adapter(teacher_folder, changed, tmp_path / "found", 2)

    ours = {key: tensor.double() for key, tensor in merged(teacher_folder, tmp_path / "found").items()}
    change = {key: (after[key].double() - before[key].double()).square().sum().item() for key in after}
    left = {key: (after[key].double() - ours[key]).square().sum().item() for key in after}
    adapted = {f"{layer.name}.weight": layer for layer in extraction.layers}
    for key, layer in adapted.items():
        assert layer.change == pytest.approx(change[key])
        assert layer.explained == pytest.approx(1 - left[key] / change[key], abs=1e-5)
        assert 0 < layer.explained < layer.ceiling < 1
        norms = [state[key].double().norm(dim=1) for state in (before, after)]
        assert layer.norm_change == pytest.approx(((norms[1] - norms[0]).norm() / norms[0].norm()).item())
    sums = [sum(figures[key] for key in adapted) for figures in (change, left)]
    assert extraction.explained == pytest.approx(1 - sums[1] / sums[0], abs=1e-5)
    assert extraction.change == pytest.approx(sum(change.values()))
    others = {figures.name: figures for figures in extraction.others}
    assert others.keys() == {key for key in change if change[key] and key not in adapted}
    assert extraction.not_adapted == pytest.approx(1 - sums[0] / sum(change.values()))
    kinds = extraction.not_adapted_by_kind()
    convolutions = sum(change[k] for k in change if k not in adapted and before[k].ndim == 4)
    assert kinds["Conv2d"] == pytest.approx(convolutions / sum(change.values()))
    assert sum(kinds.values()) == pytest.approx(extraction.not_adapted)

    saved = json.loads((tmp_path / "found" / "extract.json").read_text())
    assert saved["layers"] == [dataclasses.asdict(layer) for layer in extraction.layers]
    assert saved["explained"] == extraction.explained
    lines = table(extraction).splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(adapted)]] == [x.name for x in extraction.layers]
    assert lines[1 + len(adapted)].split()[-2] == f"{100 * extraction.ceiling:.2f}"
    picture = np.asarray(Image.open(tmp_path / "found" / "extract.png").convert("RGB"), int)
    assert (np.abs(picture - (0x25, 0x63, 0xEB)).sum(2) == 0).mean() > 0.02  # bars


def test_nothing_changed_is_told_as_such(teacher_folder, tmp_path):
    extraction = extract_adapter(teacher_folder, teacher_folder, tmp_path / "found", 2)
    assert extraction.explained is extraction.ceiling is extraction.not_adapted is None
    assert not extraction.others
    assert table(extraction).splitlines()[-1].split() == ["not", "adapted", "-"]
    assert Student.read(tmp_path / "found").alpha_T_squared is None
    ours = merged(teacher_folder, tmp_path / "found")
    assert all(torch.equal(ours[key], tensor) for key, tensor in load_file(teacher_folder / UNET).items())


def test_the_steps_of_a_student_go_with_it(teacher_folder, adapter, tmp_path):
    """To the adapter that is extracted, and to the pipeline of a swap; with its record or without."""
    steps, pipeline = fractions(4), StableDiffusionPipeline.from_pretrained(teacher_folder)
    pipeline.unet.load_state_dict(merged(teacher_folder, adapter))
    StudentPipeline(pipeline, steps=steps).save_pretrained(tmp_path / "student")
    extract_adapter(teacher_folder, tmp_path / "student", tmp_path / "found", RANK, max_sweeps=0)
    swap_rows(teacher_folder, tmp_path / "student", "norms", tmp_path / "swapped")
    assert all(Student.read(tmp_path / name).steps == steps for name in ("found", "swapped"))
    swap_rows(teacher_folder, tmp_path / "found", "norms", tmp_path / "again", base=teacher_folder)
    for name in ("swapped", "again"):
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / name)
        assert pipeline.scheduler.config.original_inference_steps == 4
    (tmp_path / "student" / "student.json").unlink()
    extract_adapter(teacher_folder, tmp_path / "student", tmp_path / "more", RANK, max_sweeps=0)
    assert Student.read(tmp_path / "more").steps == steps


def test_pixart_with_the_students_own_alpha(tmp_path):
    tiny_pixart().save_pretrained(tmp_path / "teacher")
    random_adapter(tiny_pixart().transformer, tmp_path / "adapter")
    mark_student(tmp_path / "adapter", tiny_pixart(), 0.0047)
    export_pipeline(tmp_path / "teacher", tmp_path / "adapter", tmp_path / "student")
    extraction = extract_adapter(tmp_path / "teacher", tmp_path / "student", tmp_path / "found", RANK)
    assert extraction.explained == pytest.approx(1, abs=1e-8)
    assert Student.read(tmp_path / "found").alpha_T_squared == pytest.approx(0.0047)
    load_adapter(tiny_pixart().transformer, tmp_path / "found")


def test_mistakes_are_one_line(teacher_folder, v_teacher_folder, student, tmp_path):
    tiny_pixart().save_pretrained(tmp_path / "pixart")
    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    tensors = load_file(broken / UNET)
    tensors["conv_in.weight"][0, 0, 0, 0] = math.nan
    save_file(tensors, broken / UNET)
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "model_index.json").write_text('{"_class_name": "DiffusionPipeline"}')
    cases = [
        (teacher_folder, tmp_path / "pixart", 2, "not of one architecture"),
        (teacher_folder, broken, 2, "not all finite in torch.float32, such as conv_in.weight"),
        (v_teacher_folder, student, 2, "predicts epsilon, and .* predicts v_prediction"),
        (teacher_folder, tmp_path / "nowhere", 2, "nowhere: no such folder"),
        (teacher_folder, lonely, 2, "neither a U-Net nor a transformer"),
        (teacher_folder, student, 0, "--rank 0"),
    ]
    for teacher, other, r, message in cases:
        with pytest.raises(WadiError, match=message) as caught:
            extract_adapter(teacher, other, tmp_path / "found", r)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "found").exists()
    with pytest.raises(WadiError, match="--device meow: is not on this machine"):
        extract_adapter(teacher_folder, student, tmp_path / "found", 2, device="meow")
    for out in (broken, broken.parent):
        with pytest.raises(WadiError, match="which is read"):
            extract_adapter(teacher_folder, broken, out, 2)
    assert (broken / UNET).exists()
