"""Files of differences, added to the teacher's weights by the names that ComfyUI gives them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.onestep.formats.cases import FAMILIES, save_student
from tests.onestep.formats.test_lora import PARTS, merged
from tests.tiny import tiny_pipeline
from wadi.errors import WadiError
from wadi.onestep import export_pipeline, load_pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_differences_and_teacher_are_the_student(family, tmp_path):
    folder = save_student(FAMILIES[family](), tmp_path, text=family == "sd")
    file = tmp_path / "diff.safetensors"
    export_pipeline(folder / "teacher", folder / "adapter", file, format="lycoris-diff")
    added = load_file(file)
    assert all(name.endswith(".diff") for name in added)
    teacher, student = load_pipeline(folder / "teacher"), merged(folder)
    for part in PARTS:
        if (module := getattr(student, part, None)) is None:
            continue
        before = getattr(teacher, part).state_dict()
        for name, tensor in module.state_dict().items():
            difference = added.pop(f"{name_in_comfy(part, name.removesuffix('.weight'))}.diff", 0)
            torch.testing.assert_close(before[name] + difference, tensor, atol=1e-6, rtol=1e-6, msg=name)
    assert not added


def name_in_comfy(part, layer):
    """The rule of ComfyUI's `model_lora_keys_unet` and `model_lora_keys_clip`."""
    if part == "transformer":
        return f"transformer.{layer}"
    if part == "text_encoder":
        return f"lora_te_text_model_{layer.removeprefix('text_model.').replace('.', '_')}"
    name = "lora_unet_" + layer.replace(".", "_")
    return name.replace("add_embedding_linear_1", "label_emb_0_0").replace(
        "add_embedding_linear_2", "label_emb_0_2"
    )


def test_an_adapter_that_changes_nothing_is_refused(tmp_path):
    folder = save_student(tiny_pipeline(), tmp_path)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(zeros, folder / "adapter" / "adapter_model.safetensors")
    for format, more in (("lycoris-diff", {}), ("lora", {"rank": 2})):
        with pytest.raises(WadiError, match="changes no weight"):
            export_pipeline(
                folder / "teacher", folder / "adapter", tmp_path / "a.safetensors", format=format, **more
            )
