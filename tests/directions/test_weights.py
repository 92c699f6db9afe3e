"""Whatever the files are, the tensors are the network's."""

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.directions.cases import WEIGHTS, save_whole_checkpoint
from tests.tiny import tiny_pipeline
from wadi import LoRaDConfig, WadiError
from wadi.directions.weights import check_pair, ldm_names, open_weights
from wadi.errors import WadiWarning


@pytest.fixture(scope="module")
def unet():
    return tiny_pipeline().unet


def assert_same(weights, network, **tolerance):
    state = network.state_dict()
    assert weights.shapes() == {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key, tensor in state.items():
        torch.testing.assert_close(weights.read(key), tensor.float(), **(tolerance or {"rtol": 0, "atol": 0}))


def test_pipeline_network_folder_and_file(unet, teacher_folder):
    part = teacher_folder / "unet"
    for source in (teacher_folder, part, part / WEIGHTS):
        assert_same(open_weights(source), unet)


def test_shards(unet, tmp_path):
    unet.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(open_weights(tmp_path), unet)
    index = tmp_path / f"{WEIGHTS}.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["nothing.weight"] = next(iter(places["weight_map"].values()))
    index.write_text(json.dumps(places))
    with pytest.raises(WadiError, match=r"names nothing\.weight"):
        open_weights(tmp_path)


def test_half_precision_and_prefixes(unet, tmp_path):
    half = {f"unet.{key}": tensor.half() for key, tensor in unet.state_dict().items()}
    save_file(half, tmp_path / "student.safetensors")
    weights = open_weights(tmp_path / "student.safetensors")
    assert torch.equal(weights.read("conv_in.weight"), half["unet.conv_in.weight"].float())


@pytest.mark.parametrize("layers", [1, 2])
def test_a_whole_checkpoint(layers, tmp_path):
    config = dict(tiny_pipeline().unet.config, layers_per_block=layers)
    network = type(tiny_pipeline().unet).from_config(config)
    save_whole_checkpoint(network, tmp_path / "sd.safetensors", layers)
    assert_same(open_weights(tmp_path / "sd.safetensors"), network)


def test_names_of_sd_xl_have_its_added_embedding():
    ldm = "model.diffusion_model.label_emb.0."
    names = ldm_names([f"{ldm}{i}.{part}" for i in (0, 2) for part in ("weight", "bias")])
    assert names["add_embedding.linear_1.weight"] == f"{ldm}0.weight"


CONFIGS = {
    "lorad": LoRaDConfig(r=3, target_modules=["to_q", "ff.net.2", "conv1"], rank_pattern={"to_q": 2}),
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "conv1"], bias="lora_only"),
    "dora": LoraConfig(r=2, target_modules=["to_k", "time_emb_proj"], use_dora=True, use_rslora=True),
    "modules to save": LoraConfig(r=2, target_modules=["to_k"], modules_to_save=["conv_in"]),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_merged_as_peft_merges_it(name, teacher_folder, tmp_path):
    adapted = get_peft_model(tiny_pipeline().unet, CONFIGS[name])
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path)
    base = open_weights(teacher_folder)
    weights = open_weights(tmp_path, other=base)
    check_pair(base, weights)
    assert_same(weights, adapted.merge_and_unload(), rtol=1e-5, atol=1e-6)
    kept = torch.equal(weights.read("conv_in.weight"), base.read("conv_in.weight"))
    assert kept == (name != "modules to save")


def test_the_base_of_an_adapter(teacher_folder, unet, tmp_path):
    adapted = get_peft_model(tiny_pipeline().unet, LoRaDConfig(r=2, target_modules=["to_q"]))
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(WadiError, match="names no base model; give it with --base"):
        open_weights(tmp_path)
    assert_same(open_weights(tmp_path, base=teacher_folder), unet)
    config["base_model_name_or_path"] = str(teacher_folder)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_same(open_weights(tmp_path), unet)


def test_mistakes_are_one_line(unet, teacher_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.safetensors").write_bytes(b"pickle")
    state = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    state["conv_in.weight"][0, 0, 0, 0] = math.nan
    save_file(state, tmp_path / "nan.safetensors")
    del state["conv_in.bias"]
    save_file(state, tmp_path / "less.safetensors")
    save_file({"conv_in.weight": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "int8.safetensors")
    flux = {"model.diffusion_model.input_blocks.1.0.weight": torch.ones(2, 2)}
    save_file(flux, tmp_path / "other.safetensors")
    config = LoRaDConfig(r=2, target_modules=["to_q"])
    adapted = get_peft_model(tiny_pipeline(channels=(16, 48)).unet, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = next(iter(tensors))
    (tmp_path / "elsewhere").mkdir()
    for file in (tmp_path / "adapter").iterdir():
        (tmp_path / "elsewhere" / file.name).write_bytes(file.read_bytes())
    elsewhere = {first.replace("attentions.0", "attentions.7"): tensors[first]}
    save_file(elsewhere, tmp_path / "elsewhere" / "adapter_model.safetensors")

    teacher = open_weights(teacher_folder)
    fits_not = open_weights(tmp_path / "adapter", base=teacher_folder)
    cases = [
        (lambda: open_weights(tmp_path / "empty"), "neither a pipeline"),
        (lambda: open_weights("nowhere"), "nowhere: no such folder"),
        (lambda: open_weights(tmp_path / "no.safetensors"), "no.safetensors: could not read"),
        (
            lambda: open_weights(tmp_path / "nan.safetensors").read("conv_in.weight"),
            "conv_in.weight is not finite",
        ),
        (lambda: open_weights(tmp_path / "int8.safetensors").read("conv_in.weight"), "is I8, not floating"),
        (lambda: open_weights(tmp_path / "other.safetensors"), "no name for 1 weights"),
        (
            lambda: check_pair(teacher, open_weights(tmp_path / "less.safetensors")),
            "1 weights differ, .*conv_in.bias",
        ),
        (
            lambda: [fits_not.read(f"{layer}.weight") for layer in fits_not.parts],
            "cannot be merged into .*--base",
        ),
        (lambda: open_weights(tmp_path / "elsewhere", base=teacher_folder), "there is no such layer"),
    ]
    for mistake, message in cases:
        with pytest.raises(WadiError, match=message) as caught:
            mistake()
        assert "\n" not in str(caught.value)


def test_a_run_stands_for_its_pipeline(teacher_folder, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "run" / "pipeline")
    with pytest.warns(WadiWarning, match="its pipeline is used"):
        weights = open_weights(tmp_path / "run")
    assert weights.shapes() == open_weights(teacher_folder).shapes()
