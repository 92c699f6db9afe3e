"""`wadi extract` and `wadi import`: a student, taken apart and made again."""

import numpy as np

from tests.test_cli import run
from wadi.onestep import StudentPipeline


def test_extract_and_import_give_the_student_back(student, teacher_folder, tmp_path, capsys):
    pair = ["--teacher", teacher_folder, "--student", student / "pipeline"]
    assert run("extract", *pair, "--out", tmp_path / "found", "--rank", 4, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].split() == ["all", "adapted", "layers", *["100.00", "%"] * 3]
    assert lines[-1].endswith(f"--model {teacher_folder} --adapter {tmp_path / 'found'}")
    weights = student / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    options = ["--model", teacher_folder, "--alpha-t-squared", "None", "--out", tmp_path / "imported"]
    assert run("import", weights, *options) == 0
    said = capsys.readouterr().out
    assert f"{weights}: UNet2DConditionModel, " in said
    assert "one step: the network predicts epsilon, alpha_T^2 = 0.00466\n" in said
    sources = ((student / "pipeline",), (tmp_path / "imported",), (teacher_folder, tmp_path / "found"))
    images = [
        StudentPipeline.from_pretrained(*source)("a red cat", seed=3, output_type="np") for source in sources
    ]
    assert np.array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() < 1e-3
