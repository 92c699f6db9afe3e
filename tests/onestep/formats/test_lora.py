"""Students as LoRAs: their names in diffusers, and what they lose."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests.onestep.formats.cases import FAMILIES, save_lora_student, save_student
from tests.tiny import tiny_pipeline
from wadi.errors import WadiError
from wadi.onestep import export_pipeline, load_pipeline
from wadi.onestep.adapters import merge_adapters

PARTS = ("unet", "transformer", "text_encoder")


def merged(folder):
    pipeline = load_pipeline(folder / "teacher")
    merge_adapters(pipeline, folder / "adapter")
    return pipeline


def check_stock_reads(file, folder):
    """Stock diffusers fuses the file into the teacher: the weights are those of the merged student."""
    pipeline, expected = DiffusionPipeline.from_pretrained(folder / "teacher"), merged(folder)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for part in PARTS:
        if (module := getattr(expected, part, None)) is not None:
            found = getattr(pipeline, part).state_dict()
            for name, tensor in module.state_dict().items():
                torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_student_keeps_its_factors(family, tmp_path):
    folder, file = save_lora_student(FAMILIES[family](), tmp_path), tmp_path / "lora.safetensors"
    assert export_pipeline(folder / "teacher", folder / "adapter", file, format="lora") is None
    check_stock_reads(file, folder)
    own = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sum(".lora_down." in name or ".lora_A." in name for name in load_file(file)) == len(own) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lorad_student_of_full_rank_loses_nothing(family, tmp_path):
    folder = save_student(FAMILIES[family](), tmp_path, text=family == "sd")
    file = tmp_path / "lora.safetensors"
    loss = export_pipeline(folder / "teacher", folder / "adapter", file, format="lora", rank=999)
    assert loss.total < 1e-10
    check_stock_reads(file, folder)


def test_what_is_lost_is_measured_and_refused_with_the_rank_that_would_do(tmp_path):
    folder = save_student(tiny_pipeline(), tmp_path)
    call = {"teacher": folder / "teacher", "adapter": folder / "adapter", "out": tmp_path / "a.safetensors"}
    with pytest.raises(WadiError, match=r"loses [1-9]\d\.\d% .* allows 10\.0%") as raised:
        export_pipeline(**call, format="lora", rank=1)
    assert not call["out"].exists()
    enough = int(re.search(r"give --rank (\d+)", str(raised.value))[1])
    with pytest.raises(WadiError, match=f"give --rank {enough},"):
        export_pipeline(**call, format="lora", rank=enough - 1)
    lower = export_pipeline(**call, format="lora", rank=1, max_loss=1.0)
    loss = export_pipeline(**call, format="lora", rank=enough, overwrite=True)
    assert loss.total <= 0.1 < lower.total
    teacher, student = load_pipeline(folder / "teacher").unet.state_dict(), merged(folder).unet.state_dict()
    tensors, lost = load_file(call["out"]), 0.0
    for name in loss.by_layer():
        weight = name.removeprefix("unet.") + ".weight"
        change = (student[weight] - teacher[weight]).flatten(1)
        key = "lora_unet_" + weight.removesuffix(".weight").replace(".", "_")
        factors = (tensors[f"{key}.lora_{which}.weight"].flatten(1) for which in ("up", "down"))
        lost += (change - torch.linalg.multi_dot([*factors, torch.eye(change.shape[1])])).square().sum()
    whole = sum((student[name] - teacher[name]).square().sum() for name in teacher)
    assert loss.total == pytest.approx(float(lost / whole), rel=1e-4)


def test_lorad_needs_a_rank(tmp_path):
    folder = save_student(tiny_pipeline(), tmp_path)
    with pytest.raises(WadiError, match="give --rank, such as --rank 64"):
        export_pipeline(folder / "teacher", folder / "adapter", tmp_path / "a.safetensors", format="lora")
