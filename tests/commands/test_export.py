"""`wadi export`: the folder, and what it may replace."""

import pytest
import torch

from tests.test_cli import run
from wadi.errors import WadiError
from wadi.onestep import StudentPipeline, load_pipeline
from wadi.teachers import prepare_teacher


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


def test_a_lora_tells_what_it_loses_by_layer(student, teacher_folder, tmp_path, capsys):
    arguments = ["export", student / "adapter", "--model", teacher_folder, "--format", "lora"]
    out = tmp_path / "a.safetensors"
    assert run(*arguments, "--out", out, "--rank", "1", "--max-loss", "1", "--by-layer") == 0
    *layers, total, written = capsys.readouterr().out.splitlines()
    assert total.startswith("rank 1 loses ")
    assert f"of {len(layers)} weights" in total
    assert all("%  unet." in line for line in layers)
    assert written.startswith(str(out))
    assert run(*arguments, "--out", tmp_path / "folder", "--rank", "1") == 2
    assert "must end in .safetensors" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*is converted once:wadi.errors.WadiWarning")
def test_a_single_file_is_a_teacher_s_file_again(student, teacher_folder, tmp_path):
    """What one command writes, another reads: the weights of the file are those of the exported folder."""
    arguments = ["export", student / "adapter", "--model", teacher_folder]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    assert run(*arguments, "--out", tmp_path / "a.safetensors", "--format", "single-file") == 0
    unet = load_pipeline(prepare_teacher(tmp_path / "a.safetensors", tmp_path / "out")).unet.state_dict()
    expected = load_pipeline(tmp_path / "out").unet.state_dict()
    assert all(torch.equal(unet[name], tensor) for name, tensor in expected.items())
