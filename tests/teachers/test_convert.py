"""Folders and files of pickled weights become safetensors that the libraries load."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from tests.teachers.original import save_original
from tests.tiny import tiny_pipeline, tiny_sd3, tiny_t5
from wadi.cli import main
from wadi.errors import WadiError, WadiWarning
from wadi.onestep import load_pipeline
from wadi.outputs import MARKER
from wadi.teachers import prepare_teacher
from wadi.teachers.convert import convert_weights


def pickled(folder, **form):
    """Turn every safetensors file of a folder into a file of torch.save, with the libraries' older names."""
    for file in sorted(folder.rglob("*.safetensors")):
        name = file.name.replace(".safetensors", ".bin")
        name = f"pytorch_{name}" if name.startswith("model") else name
        torch.save(load_file(file), file.with_name(name), **form)
        file.unlink()
    for file in sorted(folder.rglob("*.safetensors.index*.json")):
        text = file.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
        name = file.name.replace(".safetensors.", ".bin.")
        name = f"pytorch_{name}" if name.startswith("model") else name
        file.with_name(name).write_text(text)
        file.unlink()
    return folder


def contents(folder):
    """Name of every file below a folder -> its content; of weights the tensors, of JSON files the values."""
    found = {}
    for file in folder.rglob("*"):
        if file.is_file() and file.name != MARKER:
            read = {".safetensors": load_file, ".json": lambda file: json.loads(file.read_text())}
            found[file.relative_to(folder).as_posix()] = read.get(file.suffix, type(file).read_bytes)(file)
    return found


def check_same(folder, expected):
    found, expected = contents(folder), contents(expected)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        if not name.endswith(".safetensors"):
            assert found[name] == content, name
            continue
        assert found[name].keys() == content.keys()
        assert all(torch.equal(found[name][key], tensor) for key, tensor in content.items()), name


SAVED = {
    "plain": {},
    "variant": {"variant": "fp16"},
    "shards": {"max_shard_size": "100KB"},
    "shards of a variant": {"variant": "fp16", "max_shard_size": "100KB"},
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("form", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_pipeline_comes_back_under_the_names_of_the_libraries(saved, form, tmp_path, capsys):
    pipeline = tiny_pipeline() if saved != "plain" else tiny_sd3()  # its T5 has tied weights
    pipeline.save_pretrained(tmp_path / "whole", **SAVED[saved])
    pickled(shutil.copytree(tmp_path / "whole", tmp_path / "bin"), **form)
    with pytest.raises(WadiError, match=rf"wadi convert {tmp_path / 'bin'} --out NEW_FOLDER"):
        load_pipeline(tmp_path / "bin")
    before = contents(tmp_path / "bin").keys()
    assert main(["convert", str(tmp_path / "bin"), "--out", str(tmp_path / "new")]) == 0
    count = len(list((tmp_path / "whole").rglob("*.safetensors")))
    assert f"in {count} safetensors files" in capsys.readouterr().out
    check_same(tmp_path / "new", tmp_path / "whole")
    assert contents(tmp_path / "bin").keys() == before
    load_pipeline(tmp_path / "new")


def test_tied_weights_are_written_both_times(tmp_path):
    encoder = tiny_t5(16)["encoder"]
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    convert_weights(tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= found.keys() == encoder.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_checkpoint_in_the_original_layout_becomes_a_teacher(tmp_path):
    pipeline = tiny_pipeline()
    file = save_original(pipeline, tmp_path / "whole.safetensors")
    pipeline.save_pretrained(tmp_path / "config")
    torch.save({"state_dict": load_file(file), "epoch": 3, "global_step": 7}, tmp_path / "model.ckpt")
    with pytest.raises(WadiError, match=r"model.ckpt --out \S*model.safetensors"):
        prepare_teacher(tmp_path / "model.ckpt", tmp_path / "config")
    with pytest.warns(WadiWarning, match="only weights are written; omitted: epoch, global_step"):
        made = convert_weights(tmp_path / "model.ckpt", tmp_path / "model.safetensors")
    assert (made.files, made.tensors) == (["model.safetensors"], len(load_file(file)))
    with pytest.warns(WadiWarning, match="is converted once"):
        folder = prepare_teacher(tmp_path / "model.safetensors", tmp_path / "config")
    found = StableDiffusionPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in pipeline.unet.state_dict().items())


def test_files_of_a_training_and_converted_ones_are_omitted(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("pytorch_model.bin", "optimizer.bin", "adapter_model.bin", "SD.CKPT"):
        torch.save({"a": torch.ones(2)}, folder / name)
    convert_weights(folder / "pytorch_model.bin", folder / "model.safetensors")
    (folder / "notes.txt").write_text("mine")
    with pytest.warns(WadiWarning) as told:
        made = convert_weights(folder, tmp_path / "out")
    assert sorted(str(warning.message).partition(": ")[0] for warning in told) == [
        str(folder / "optimizer.bin"),
        str(folder / "pytorch_model.bin"),
    ]
    assert sorted(made.files) == ["SD.safetensors", "adapter_model.safetensors"]
    names = {*made.files, "model.safetensors", "notes.txt"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names | {MARKER}


def test_what_cannot_be_converted_leaves_nothing(tmp_path):
    weights, module = {"a": torch.ones(2)}, torch.nn.Linear(2, 2)
    for name, files in {"whole": {"a.bin": module}, "two": {"a.bin": weights, "a.pt": weights}}.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            torch.save(content, tmp_path / name / file)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.safetensors").touch()
    before = sorted(tmp_path.rglob("*"))
    for source, out, said in (
        ("nowhere", "out", "no such folder or file"),
        ("none", "out", "nothing is to be converted"),
        ("none/a.safetensors", "b.safetensors", "is empty"),
        ("two/a.bin", "out", "must end in .safetensors"),
        ("two/a.bin", "none", "name a file"),
        ("two", "two", "is read and would be lost"),
        ("two", "out", "two files of this name"),
        ("whole", "out", "a.bin: names"),
    ):
        with pytest.raises(WadiError, match=said) as raised:
            convert_weights(tmp_path / source, tmp_path / out)
        assert "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    with pytest.raises(WadiError, match="did not write it"):
        convert_weights(tmp_path / "two", tmp_path / "mine", overwrite=True)
