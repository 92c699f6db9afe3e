"""Single files in the original layout, read by diffusers' own loader and compared with another writer's."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from tests.onestep.formats.cases import FAMILIES, save_student
from tests.teachers.original import save_original
from tests.tiny import PROMPTS, tiny_pipeline, tiny_pixart, tiny_t5
from wadi.errors import WadiError, WadiWarning
from wadi.onestep import export_pipeline, load_pipeline
from wadi.onestep.formats.asked import transformer_tensors
from wadi.onestep.formats.single_file import single_file_tensors


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_the_layout_is_that_of_another_writer(family, tmp_path):
    pipeline = FAMILIES[family]()
    expected = load_file(save_original(pipeline, tmp_path / "file.safetensors"))
    found = single_file_tensors(pipeline)
    # the projection of SD 3's first CLIP is read by ComfyUI, and T5's table of tokens has two names
    more = ("clip_l.transformer.text_projection.weight", "t5xxl.transformer.encoder.embed_tokens.weight")
    assert found.keys() - expected.keys() <= {f"text_encoders.{name}" for name in more}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl", "sd3"])
def test_from_single_file_reads_what_from_pretrained_reads(family, tmp_path):
    pipeline = FAMILIES[family]()
    if family == "sd3":  # as the published one; diffusers reads no other
        torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    folder, file = save_student(pipeline, tmp_path), tmp_path / "file.safetensors"
    for out, format in ((tmp_path / "folder", "diffusers"), (file, "single-file")):
        export_pipeline(folder / "teacher", folder / "adapter", out, format=format)
    merged = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    read = type(merged).from_single_file(file, config=str(tmp_path / "folder"), local_files_only=True)
    for name, part in merged.components.items():
        if isinstance(part, torch.nn.Module):
            state = getattr(read, name).state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in part.state_dict().items()), name
            getattr(read, name).eval()  # diffusers leaves T5 in training mode
    images = []
    for each in (merged, read):
        each.scheduler = merged.scheduler  # the file has none
        call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
        images.append(each(PROMPTS[0], generator=torch.Generator().manual_seed(3), **call).images)
    assert np.abs(images[0] - images[1]).max() < 1e-5  # weights lie in memory at other places
    assert images[0].std() > 0.01


def test_the_header_says_what_the_student_is(tmp_path):
    folder = save_student(tiny_pipeline(), tmp_path)
    (folder / "adapter" / "README.md").write_text("---\nlicense: openrail\n---\n# A student\n")
    export_pipeline(
        folder / "teacher",
        folder / "adapter",
        tmp_path / "a.safetensors",
        torch.float16,
        format="single-file",
    )
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        header = opened.metadata()
        assert all(opened.get_tensor(name).dtype == torch.float16 for name in opened.keys())  # noqa: SIM118
    assert header["wadi.teacher"] == "teacher"
    assert header["wadi.steps"] == "1"
    assert header["modelspec.license"] == "openrail"
    assert "modelspec.architecture" not in header  # no program runs so small a network as Stable Diffusion 1
    assert json.loads(header["wadi.student"])["prediction"] == "epsilon"
    assert str(tmp_path) not in str(header)


@pytest.mark.parametrize(
    "card", ["no card", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\nname: a\n---\n"]
)
def test_a_card_without_a_licence_is_no_error(card, tmp_path):
    folder, file = save_student(tiny_pipeline(), tmp_path), tmp_path / "a.safetensors"
    (folder / "adapter" / "README.md").write_text(card)
    export_pipeline(folder / "teacher", folder / "adapter", file, format="lycoris-diff")
    with safe_open(file, "pt") as opened:
        assert "modelspec.license" not in opened.metadata()


@pytest.mark.parametrize(
    ("named", "told"), [("owner/model-1.5", "owner/model-1.5"), ("/home/somebody/models/mine", "mine")]
)
def test_the_header_names_the_teacher_that_the_adapter_names(named, told, tmp_path):
    folder, file = save_student(tiny_pipeline(), tmp_path), tmp_path / "a.safetensors"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": named})
    )
    export_pipeline(folder / "teacher", folder / "adapter", file, format="lycoris-diff")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["wadi.teacher"] == told
        assert told in opened.metadata()["modelspec.title"]


def test_flux_rows_lie_where_the_published_file_has_them():
    transformer = FAMILIES["flux"]().transformer
    state, found = transformer.state_dict(), transformer_tensors(transformer)
    block = "single_transformer_blocks.1"
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    joined = torch.cat([state[f"{block}.{name}.weight"] for name in names])
    assert torch.equal(found["single_blocks.1.linear1.weight"], joined)
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    assert torch.equal(found["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))
    assert sum(tensor.numel() for tensor in found.values()) == sum(map(torch.numel, state.values()))


def test_marks_tell_that_a_student_of_sdxl_predicts_v():
    pipeline = FAMILIES["sdxl"]()
    pipeline.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert {"v_pred", "ztsnr"} <= single_file_tensors(pipeline).keys()
    first = tiny_pipeline(prediction_type="v_prediction")
    with pytest.warns(WadiWarning, match="choose v prediction"):
        single_file_tensors(first)


def test_a_family_without_a_layout_is_refused(tmp_path):
    pipeline = tiny_pixart()
    with pytest.raises(WadiError, match="--format transformer for ComfyUI"):
        single_file_tensors(pipeline)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one.unet.register_to_config(layers_per_block=[1, 1]), "layers_per_block"),
        (lambda one: setattr(one, "vae", AutoencoderTiny()), "is for an AutoencoderKL"),
        (lambda one: setattr(one, "text_encoder", tiny_t5(16)["encoder"]), "is for a CLIP"),
    ],
)
def test_parts_of_another_kind_are_refused(change, said):
    pipeline = tiny_pipeline()
    change(pipeline)
    with pytest.raises(WadiError, match=said):
        single_file_tensors(pipeline)


def test_a_network_without_a_place_in_the_layout_is_refused(teacher_folder):
    pipeline = load_pipeline(teacher_folder)
    pipeline.unet.register_parameter("extra", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(WadiError, match="no place for 1 weights"):
        single_file_tensors(pipeline)
