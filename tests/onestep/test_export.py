"""What every format refuses, folders in shards, and files that are copied."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.onestep.formats.cases import save_student
from tests.tiny import tiny_pipeline
from wadi.errors import WadiError, WadiWarning
from wadi.onestep import Student, export_pipeline
from wadi.onestep.export import FILE_FORMATS
from wadi.outputs import MARKER

FORMATS = {"diffusers": {}, "single-file": {}, "unet": {}, "lycoris-diff": {}, "lora": {"rank": 2}}
"""Every format of a U-Net, with the options that it needs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_student(tiny_pipeline(), tmp_path_factory.mktemp("student"))


def out_of(format, tmp_path):
    return tmp_path / ("out.safetensors" if format in FILE_FORMATS else "out")


@pytest.mark.parametrize("format", FORMATS)
def test_what_does_not_fit_is_refused_in_every_format(format, folder, tmp_path):
    out, options = out_of(format, tmp_path), {"format": format} | FORMATS[format]
    tiny_pipeline(channels=(8, 16)).save_pretrained(tmp_path / "other")
    with pytest.raises(WadiError, match="made for another base model"):
        export_pipeline(tmp_path / "other", folder / "adapter", out, **options)
    export_pipeline(folder / "teacher", folder / "adapter", tmp_path / "student")
    with pytest.raises(WadiError, match="student already"):
        export_pipeline(tmp_path / "student", folder / "adapter", out, **options)
    assert not out.exists()


WRONG = (
    ({"format": "ckpt"}, "must be one of diffusers, single-file"),
    ({"rank": 4}, "are for --format lora"),
    ({"format": "lora", "rank": 0}, "--rank 0: must be at least 1"),
    ({"format": "lora", "rank": 2, "max_loss": 1.5}, "must be from 0 to 1"),
    ({"format": "single-file", "max_shard_size": "5GB"}, "single-file is one file"),
    ({"max_shard_size": "five"}, "must be such as 500MB"),
    ({"format": "transformer"}, "has a unet; choose --format unet"),
    ({"format": "single-file"}, "the name of the file must end in .safetensors"),
)


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[said for _, said in WRONG])
def test_wrong_options_are_refused(options, said, folder, tmp_path):
    out = tmp_path / ("out.safetensors" if options.get("format") == "lora" else "out")
    with pytest.raises(WadiError, match=said) as raised:
        export_pipeline(folder / "teacher", folder / "adapter", out, **options)
    assert "\n" not in str(raised.value)
    assert not out.exists()


@pytest.mark.parametrize("format", ["lora", "single-file", "unet"])
def test_what_is_there_is_replaced_only_where_it_is_asked_for(format, folder, tmp_path):
    out, options = out_of(format, tmp_path), {"format": format} | FORMATS[format] | {"max_loss": 1.0}
    if format != "lora":
        del options["max_loss"]
    call = {"teacher": folder / "teacher", "adapter": folder / "adapter", "out": out} | options
    export_pipeline(**call)
    with pytest.raises(WadiError, match="--overwrite"):
        export_pipeline(**call)
    export_pipeline(**call, overwrite=True)
    with pytest.raises(WadiError, match="which is read and would be lost"):
        export_pipeline(**call | {"out": folder / "adapter" if format == "unet" else folder}, overwrite=True)


def test_a_network_alone_is_that_of_the_pipeline(folder, tmp_path):
    for out, options in (("whole", {}), ("unet", {"format": "unet", "max_shard_size": "100KB"})):
        export_pipeline(folder / "teacher", folder / "adapter", tmp_path / out, **options)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert Student.read(tmp_path / "unet") == Student.read(folder / "adapter")
    assert str(tmp_path) not in (tmp_path / "unet" / "config.json").read_text()
    found = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    expected = load_file(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_unchanged_parts_are_the_teacher_s_files(folder, tmp_path):
    """Older transformers need the vocabulary as two files, and the names of the text encoder's weights."""
    teacher = tmp_path / "teacher"
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(teacher)
    vocabulary = json.dumps(pipeline.tokenizer.get_vocab())
    (teacher / "tokenizer" / "vocab.json").write_text(vocabulary)
    (teacher / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    weights = teacher / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": one for name, one in load_file(weights).items()}
    save_file(old, weights, {"format": "pt"})
    export_pipeline(teacher, folder / "adapter", tmp_path / "out", max_shard_size="100KB")
    copied = [file for part in ("vae", "text_encoder", "tokenizer") for file in (teacher / part).iterdir()]
    assert len(copied) > 6
    for file in copied:
        assert (tmp_path / "out" / file.relative_to(teacher)).read_bytes() == file.read_bytes(), file
    assert len(list((tmp_path / "out" / "unet").glob("*.safetensors"))) > 1
    export_pipeline(teacher, folder / "adapter", tmp_path / "half", torch.float16)
    assert load_file(tmp_path / "half" / "text_encoder" / "model.safetensors").keys() == old.keys()
    whole, half = (StableDiffusionPipeline.from_pretrained(tmp_path / name) for name in ("out", "half"))
    for name, tensor in whole.unet.state_dict().items():
        torch.testing.assert_close(half.unet.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)
    assert (tmp_path / "out" / MARKER).is_file()


@pytest.mark.parametrize(("alpha", "told"), [(None, 0), (0.0047, 0), (0.02, 1)])
def test_a_schedule_that_programs_do_not_know_is_told(alpha, told, folder, tmp_path, recwarn):
    adapter = shutil.copytree(folder / "adapter", tmp_path / "adapter")
    record = json.loads((adapter / "student.json").read_text())
    (adapter / "student.json").write_text(json.dumps(record | {"alpha_T_squared": alpha}))
    export_pipeline(folder / "teacher", adapter, tmp_path / "a.safetensors", format="single-file")
    said = [str(one.message) for one in recwarn if one.category is WadiWarning]
    assert len(said) == told
    assert all("set the first sigma there to 7" in text for text in said)  # sqrt(1 / 0.02 - 1)
