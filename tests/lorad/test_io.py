"""Adapter folders: PEFT's own files, each mistake one line that names the file."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.lorad.cases import CASES, mlp
from tests.tiny import tiny_pipeline
from wadi.lorad import LoRaDConfig, load_adapter, save_adapter

PLAIN = [case for case in CASES if not case.name.startswith(("gpt2, default", "llama, default"))]
every_case = pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
MLP = CASES[0]


def injected(case, adapter_name="default", **options):
    torch.manual_seed(1)
    return inject_adapter_in_model(case.config(**options), case.model(), adapter_name)


@every_case
def test_both_ways_between_plain_models_and_peft(case, tmp_path):
    x = case.inputs()
    model = injected(case, "mine")
    expected = case.output(model, x)
    save_adapter(model, tmp_path / "ours", "mine")
    peft_model = PeftModel.from_pretrained(case.model(), tmp_path / "ours").eval()
    assert torch.equal(case.output(peft_model, x), expected)

    peft_model.save_pretrained(tmp_path / "theirs")
    plain = case.model()
    assert load_adapter(plain, tmp_path / "theirs", "again") is plain
    assert torch.equal(case.output(plain, x), expected)
    assert not any(p.requires_grad for p in plain.parameters())
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_saving_from_a_peft_model_is_saving_its_adapter(tmp_path):
    torch.manual_seed(1)
    model = get_peft_model(MLP.model(), MLP.config())
    save_adapter(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    doubled = {key: 2 * value for key, value in model.state_dict().items()}
    save_adapter(model, tmp_path / "c", state_dict=doubled)
    c = load_file(tmp_path / "c" / "adapter_model.safetensors")
    assert all(torch.equal(2 * a[key], c[key]) for key in a)


def test_the_same_adapter_is_the_same_file(tmp_path):
    for folder in ("a", "b"):
        save_adapter(injected(MLP), tmp_path / folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    names = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)


def test_state_dict_takes_the_place_of_the_models_values(tmp_path):
    model = injected(MLP, "mine")
    average = {name: p.detach() * 0.5 for name, p in model.named_parameters() if "lorad_" in name}
    save_adapter(model, tmp_path, "mine", state_dict=average)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"{key}.mine" for key in saved} == {f"base_model.model.{key}" for key in average}
    assert all(
        torch.equal(value, average[f"{key.removeprefix('base_model.model.')}.mine"])
        for key, value in saved.items()
    )
    average.popitem()
    with pytest.raises(ValueError, match="state_dict lacks 1 tensors of adapter 'mine'"):
        save_adapter(model, tmp_path, "mine", state_dict=average)


def test_a_second_adapter_beside_the_first(tmp_path):
    first = injected(MLP)
    save_adapter(first, tmp_path)
    model = injected(MLP, "other")
    load_adapter(model, tmp_path, "default")
    assert torch.equal(model(MLP.inputs()), first(MLP.inputs()))


def test_half_precision_model_holds_the_adapter_in_float32(tmp_path):
    save_adapter(injected(MLP), tmp_path)
    model = load_adapter(MLP.model().half(), tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for key, value in saved.items():
        assert torch.equal(model.get_parameter(f"{key.removeprefix('base_model.model.')}.default"), value)


def test_diffusers_model_keeps_its_own_adapter_methods(tmp_path):
    unet = tiny_pipeline().unet
    unet.add_adapter(LoRaDConfig(r=2, target_modules=["to_q", "to_v"], init_weights=False))
    save_adapter(unet, tmp_path)
    loaded = load_adapter(tiny_pipeline().unet, tmp_path, "style")
    loaded.set_adapters(["style"], weights=[0.0])
    loaded.disable_adapters()
    loaded.delete_adapters("style")


def test_saving_what_is_not_there(tmp_path):
    for model in (mlp(), inject_adapter_in_model(LoraConfig(target_modules=["0"]), mlp())):
        with pytest.raises(ValueError, match="Sequential has no LoRaD adapter 'default' to save"):
            save_adapter(model, tmp_path)


def break_config_missing(folder):
    (folder / "adapter_config.json").unlink()


def break_config_text(folder):
    (folder / "adapter_config.json").write_text("{")


def set_config(**values):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def break_weights_missing(folder):
    (folder / "adapter_model.safetensors").unlink()


def break_weights_bytes(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"not tensors at all")


def change_tensors(change):
    def rewrite(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return rewrite


@pytest.mark.parametrize(
    ("spoil", "file", "message"),
    [
        (break_config_missing, "adapter_config.json", "No such file"),
        (break_config_text, "adapter_config.json", "not valid JSON"),
        (set_config(peft_type="LORA"), "adapter_config.json", "peft_type is 'LORA', not 'LORAD'"),
        (set_config(r=0), "adapter_config.json", "at least 1"),
        (set_config(target_modules=["nowhere"]), "adapter_config.json", "not found in the base model"),
        (set_config(target_modules=["1"]), "adapter_config.json", "not supported"),
        (set_config(r=5), "adapter_model.safetensors", "has shape"),
        (set_config(target_modules=["0"]), "adapter_model.safetensors", "have no layer"),
        (break_weights_missing, "adapter_model.safetensors", "No such file"),
        (break_weights_bytes, "adapter_model.safetensors", "not a safetensors file"),
        (change_tensors(lambda t: t.popitem()), "adapter_model.safetensors", "1 of 6 tensors are missing"),
        (
            change_tensors(lambda t: t.update(x=torch.zeros(1))),
            "adapter_model.safetensors",
            "1 of 7 tensors have no layer",
        ),
    ],
)
def test_every_mistake_is_one_line_that_names_the_file(tmp_path, spoil, file, message):
    save_adapter(injected(MLP), tmp_path)
    spoil(tmp_path)
    model = MLP.model()
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, tmp_path)
    assert str(error.value).startswith(str(tmp_path / file))
    assert "\n" not in str(error.value)
    # the model is as it was, and takes a good adapter afterwards
    assert torch.equal(model(MLP.inputs()), MLP.model()(MLP.inputs()))
    save_adapter(injected(MLP), tmp_path / "good")
    load_adapter(model, tmp_path / "good")


def test_name_in_use(tmp_path):
    model = injected(MLP)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        load_adapter(model, tmp_path)


def test_another_architecture(tmp_path):
    save_adapter(injected(MLP), tmp_path)
    wider = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors: does not fit Sequential: 2\.lorad_A has shape"
    ):
        load_adapter(wider, tmp_path)
