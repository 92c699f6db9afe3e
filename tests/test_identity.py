"""A model, an adapter and images are the same wherever they lie, and others at the same path are not."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.onestep.test_adapters import write_adapter
from wadi.identity import adapter_digest, files_digest, model_digest, texts_digest


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensor(path):
    tensors = load_file(path)
    tensors[min(tensors)].view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


SAME = {
    "nothing": lambda folder: None,
    "another file": lambda folder: (folder / "README.md").write_text("words"),
    "a hidden file": lambda folder: (folder / "unet" / "._config.json").write_text("{}"),
    "versions": lambda folder: edit_json(folder / "unet/config.json", _diffusers_version="0.1"),
    "where it was": lambda folder: edit_json(folder / "model_index.json", _name_or_path="/elsewhere"),
}
OTHER = {
    "a weight": lambda folder: edit_tensor(folder / "unet/diffusion_pytorch_model.safetensors"),
    "the text encoder": lambda folder: edit_tensor(folder / "text_encoder/model.safetensors"),
    "the VAE": lambda folder: edit_tensor(folder / "vae/diffusion_pytorch_model.safetensors"),
    "the schedule": lambda folder: edit_json(folder / "scheduler/scheduler_config.json", beta_end=0.02),
    "the class": lambda folder: edit_json(
        folder / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline"
    ),
    "a student": lambda folder: (folder / "student.json").write_text("{}"),
}


@pytest.mark.parametrize("change", [*SAME, *OTHER])
def test_a_model_is_its_content(teacher_folder, tmp_path, change):
    folder = shutil.copytree(teacher_folder, tmp_path / "moved")
    (SAME | OTHER)[change](folder)
    assert (model_digest(folder) == model_digest(teacher_folder)) == (change in SAME)


def test_an_adapter_is_its_content(tmp_path):
    first = write_adapter(tmp_path / "first")
    moved = shutil.copytree(first, tmp_path / "moved")
    edit_json(moved / "adapter_config.json", base_model_name_or_path="/elsewhere")
    (moved / "extract.json").write_text("{}")
    assert adapter_digest(moved) == adapter_digest(first)
    for change in (
        lambda folder: edit_tensor(folder / "adapter_model.safetensors"),
        lambda folder: edit_json(folder / "adapter_config.json", r=3),
        lambda folder: edit_json(folder / "student.json", alpha_T_squared=0.5),
        lambda folder: (folder / "student.json").unlink(),
    ):
        other = shutil.copytree(first, tmp_path / "other")
        change(other)
        assert adapter_digest(other) != adapter_digest(first)
        shutil.rmtree(other)


def test_files_and_texts(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.PNG").write_bytes(b"image")
    (tmp_path / "two" / "notes.txt").write_text("words")
    (tmp_path / "two" / "below").mkdir()
    (tmp_path / "two" / "below" / "b.png").write_bytes(b"another")
    one, two = (files_digest(tmp_path / folder) for folder in ("one", "two"))
    assert one == two != files_digest(tmp_path / "two", below=True)
    shutil.copy(tmp_path / "one" / "a.PNG", tmp_path / "b.png")
    assert files_digest(tmp_path / "b.png") == files_digest(tmp_path / "one" / "a.PNG")
    assert texts_digest(["a", "b"]) != texts_digest(["ab"]) != texts_digest(["b", "a"])
