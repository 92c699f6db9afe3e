"""One student of several: the pipeline's own average of two adapters, and what is refused."""

import pytest
import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file

from tests.tiny import mark_student, tiny_pipeline
from wadi import cli
from wadi.backbones import student_config
from wadi.lorad import save_adapter
from wadi.onestep import Student, StudentPipeline


def write_student(folder, seed, r=2):
    unet = tiny_pipeline().unet
    inject_adapter_in_model(student_config(unet, r), unet)
    torch.manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lorad_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(unet, folder, overwrite=True)
    return folder


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    return [write_student(folder / str(seed), seed) for seed in (1, 2)]


def average(*arguments):
    return cli.main(["average", *map(str, arguments)])


def test_the_average_loads_as_a_student(students, teacher_folder, tmp_path):
    assert average(*students, "--weights", 3, 1, "--dtype", "float16", "--out", tmp_path / "mean") == 0
    first, second, mean = (
        load_file(folder / "adapter_model.safetensors") for folder in (*students, tmp_path / "mean")
    )
    for key, value in mean.items():
        expected = 0.75 * first[key].double() + 0.25 * second[key].double()
        assert torch.equal(value, expected.half())
    picture, own = (
        StudentPipeline.from_pretrained(teacher_folder, folder)("a red cat", seed=3, output_type="np")
        for folder in (tmp_path / "mean", students[0])
    )
    assert picture.shape == own.shape
    assert (picture != own).any()


def test_one_alpha_for_all(students, tmp_path, capsys):
    one, other = (write_student(tmp_path / name, seed) for name, seed in (("one", 1), ("other", 2)))
    for folder in (one, other):
        mark_student(folder, alpha_T_squared=0.0047)
    assert average(one, other, "--out", tmp_path / "mean") == 0
    assert Student.read(tmp_path / "mean") == Student.read(one)
    assert average(one, students[1], "--out", tmp_path / "none") == 2
    assert f"{students[1]}: is not a student like {one}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "options", "line"),
    [
        (lambda folder: (folder / "text_encoder").mkdir(), [], "a subject's adapter with a text encoder"),
        (lambda folder: write_student(folder, 1, r=3), [], "does not go with"),
        (lambda folder: (folder / "adapter_config.json").unlink(), [], "adapter_config.json is missing"),
        (lambda folder: None, ["--weights", "1"], "2 adapters and 1 weights"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(students, tmp_path, capsys, change, options, line):
    change(write_student(tmp_path / "other", 2))
    assert average(students[0], tmp_path / "other", *options, "--out", tmp_path / "mean") == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_writing_over_an_input_is_refused(students, capsys):
    assert average(*students, "--out", students[0]) == 2
    assert "which is read" in capsys.readouterr().err
    assert (students[0] / "adapter_model.safetensors").exists()
