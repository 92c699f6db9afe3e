"""Files of adapters: what the nodes read, and the sentence for what they do not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from integrations.comfyui.adapter import STUDENT_FILE, WEIGHTS_FILE, read_angles, read_student
from wadi.emoji import student_folder
from wadi.onestep import Student

LAYER = "base_model.model.to_q"


def test_a_folder_and_its_file_are_the_same():
    folder, file = read_angles(student_folder()), read_angles(student_folder() / WEIGHTS_FILE)
    saved = load_file(student_folder() / WEIGHTS_FILE)
    assert folder.keys() == file.keys()
    assert 2 * len(folder) == len(saved)
    for layer, factors in folder.items():
        for name, one, other in zip("AB", factors, file[layer], strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, saved[f"base_model.model.{layer}.lorad_{name}"])


def test_the_record_is_that_of_the_library():
    expected, found = Student.read(student_folder()), read_student(student_folder())
    for name in ("prediction", "steps", "alpha_T_squared"):
        assert getattr(found, name) == getattr(expected, name)


def test_a_file_without_a_record_has_no_student(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "alone.safetensors")
    assert read_student(tmp_path / "alone.safetensors") is None


def factors(A=(4, 2), B=(2, 3), **more):
    return {f"{LAYER}.lorad_A": torch.ones(A), f"{LAYER}.lorad_B": torch.ones(B)} | more


BROKEN = {
    "a LoRA": ({"to_q.lora_A.weight": torch.ones(2, 6)}, "holds no LoRaD adapter"),
    "nothing": ({}, "holds no LoRaD adapter"),
    "half": ({f"{LAYER}.lorad_A": torch.ones(4, 2)}, "lacks to_q.lorad_B"),
    "ranks": (factors(B=(3, 3)), r"\(4, 2\) and \(3, 3\), which do not belong together"),
    "axes": (factors(A=(4, 2, 1)), "do not belong together"),
    "biases": (factors(bias=torch.ones(4)), "1 tensors that are not angles, such as bias"),
    "not finite": (factors() | {f"{LAYER}.lorad_A": torch.full((4, 2), torch.nan)}, "of to_q are not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_gets_a_sentence(name, tmp_path):
    tensors, message = BROKEN[name]
    file = tmp_path / WEIGHTS_FILE
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message) as caught:
        read_angles(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")


def test_what_is_no_safetensors_gets_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_angles(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_angles(tmp_path)


GOOD = {"prediction": "epsilon", "steps": [1.0, 0.5], "alpha_T_squared": None}
RECORDS = {
    "a list": ([], "does not hold an object"),
    "prediction": (GOOD | {"prediction": "sample"}, "prediction is 'sample'"),
    "no steps": (GOOD | {"steps": []}, r"steps are \[\]"),
    "steps from elsewhere": (GOOD | {"steps": [0.9, 0.5]}, "must fall from 1"),
    "steps that rise": (GOOD | {"steps": [1.0, 0.5, 0.7]}, "must fall from 1"),
    "a step twice": (GOOD | {"steps": [1.0, 0.5, 0.5]}, "must fall from 1"),
    "a step at 0": (GOOD | {"steps": [1.0, 0.0]}, "must fall from 1"),
    "words": (GOOD | {"steps": ["1"]}, "steps must be a list of numbers"),
    "a number": (GOOD | {"steps": 1.0}, "steps must be a list of numbers"),
    "alpha": (GOOD | {"alpha_T_squared": 1.0}, "alpha_T_squared must be"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_broken_record_gets_a_sentence(name, tmp_path):
    record, message = RECORDS[name]
    save_file(factors(), tmp_path / WEIGHTS_FILE)
    (tmp_path / STUDENT_FILE).write_text(json.dumps(GOOD))
    assert read_student(tmp_path).steps == (1.0, 0.5)
    (tmp_path / STUDENT_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        read_student(tmp_path)


def test_a_record_that_is_no_json_gets_a_sentence(tmp_path):
    save_file(factors(), tmp_path / WEIGHTS_FILE)
    (tmp_path / STUDENT_FILE).write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_student(tmp_path)


def test_a_record_beside_two_adapters_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file(factors(), tmp_path / f"{name}.safetensors")
    assert read_student(tmp_path / "one.safetensors") is None
    (tmp_path / STUDENT_FILE).write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match=r"belong to one.safetensors or to two.safetensors"):
        read_student(tmp_path / "one.safetensors")
