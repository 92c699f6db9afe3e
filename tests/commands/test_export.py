"""`wadi export`: the folder, and what it may replace."""

import pytest

from tests.test_cli import run
from wadi.errors import WadiError
from wadi.onestep import StudentPipeline


def test_export_replaces_its_own_folder_and_nothing_else(student, teacher_folder, tmp_path, capsys):
    arguments = ["export", student / "adapter", "--model", teacher_folder, "--out", tmp_path / "out"]
    assert run(*arguments) == 0
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    single = weights.read_bytes()
    assert run(*arguments, "--dtype", "float16") == 2
    assert weights.read_bytes() == single
    assert run(*arguments, "--dtype", "float16", "--overwrite") == 0
    assert len(weights.read_bytes()) < 0.6 * len(single)
    assert run("export", student / "adapter", "--model", tmp_path / "out", *arguments[4:], "--overwrite") == 2
    assert "which is read" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    pipeline = StudentPipeline.from_pretrained(tmp_path / "out")
    with pytest.raises(WadiError, match="which is read"):
        pipeline.save_pretrained(tmp_path / "out", overwrite=True)
    pipeline.save_pretrained(tmp_path / "copy")
    pipeline.save_pretrained(tmp_path / "copy", overwrite=True)
    with pytest.raises(WadiError, match="give --overwrite"):
        pipeline.save_pretrained(tmp_path / "copy")


def test_export_is_the_run_s_own_pipeline(student, teacher_folder, tmp_path):
    assert run("export", student / "adapter", "--model", teacher_folder, "--out", tmp_path / "out") == 0
    ours, theirs = (
        (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for folder in (tmp_path / "out", student / "pipeline")
    )
    assert ours == theirs
