"""Adapter folders: PEFT's own files, each mistake one line that names the file."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from tests.lorad.cases import CASES, mlp
from tests.tiny import tiny_pipeline
from wadi.lorad import LoRaDConfig, average_adapters, load_adapter, save_adapter
from wadi.lorad.io import copy_adapter, fit_rank
from wadi.outputs import MARKER

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
    files = {"adapter_config.json", "adapter_model.safetensors", MARKER}
    assert {p.name for p in (tmp_path / "ours").iterdir()} == files


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


def factors(r, out=9, half=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, r, generator=generator), torch.randn(r, half, generator=generator)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 9))
def test_fit_rank_gives_the_nearest_angles(r, r_own, seed):
    found, own = factors(r, seed=seed), factors(r_own, seed=seed + 10)
    A, B = fit_rank(found, own)
    if r == r_own:
        assert A is found[0]
        assert B is found[1]
        return
    assert (A.shape, B.shape) == (own[0].shape, own[1].shape)
    theta = found[0].double() @ found[1].double()
    # Eckart and Young: what is lost is the energy of the singular values that are left out
    lost = torch.linalg.svdvals(theta)[r_own:].square().sum().sqrt()
    error = (A.double() @ B.double() - theta).norm()
    assert error.item() == pytest.approx(lost.item(), abs=1e-5 * theta.norm().item())
    if r_own > r:
        assert torch.equal(B[r:], own[1][r:])
        assert not A[:, r:].any()


def test_fit_rank_of_no_angles_is_none():
    A, B = fit_rank((torch.zeros(9, 3), torch.zeros(3, 7)), factors(5))
    assert not A.any()
    assert B.isfinite().all()


def test_fit_rank_leaves_other_layers_alone():
    found = factors(3)
    for other in (factors(4, out=8), factors(4, half=6)):
        assert fit_rank(found, other) == found


def mlp_of_rank(r, targets=("0", "2", "4"), seed=1):
    torch.manual_seed(seed)
    config = LoRaDConfig(r=r, target_modules=list(targets), init_weights=False)
    return inject_adapter_in_model(config, MLP.model())


@pytest.mark.parametrize("r", [3, 6])
def test_an_adapter_is_copied_to_the_same_rank_or_a_higher_one_exactly(r, tmp_path):
    source = mlp_of_rank(3)
    save_adapter(source, tmp_path)
    target = mlp_of_rank(r, seed=2)
    copy_adapter(target, tmp_path)
    x = MLP.inputs()
    torch.testing.assert_close(target(x), source(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mlp_of_rank(r, seed=2)(x), source(x))


def test_layers_that_the_copied_adapter_lacks_keep_what_they_have(tmp_path):
    save_adapter(mlp_of_rank(3, ["0"]), tmp_path)
    target, untouched, source = mlp_of_rank(3, seed=2), mlp_of_rank(3, seed=2), mlp_of_rank(3, ["0"])
    copy_adapter(target, tmp_path)
    assert torch.equal(target[0].lorad_A["default"], source[0].lorad_A["default"])
    assert torch.equal(target[2].lorad_A["default"], untouched[2].lorad_A["default"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(x=torch.zeros(1)), "have no layer, such as x"),
        (lambda t: t.pop("base_model.model.0.lorad_B"), "1 of 6 tensors are missing, such as 0.lorad_B"),
        (
            lambda t: t.update({"base_model.model.0.lorad_A": torch.zeros(11, 3)}),
            r"0.lorad_A has shape \(11, 3\), not \(12, 3\)",
        ),
        (lambda t: t.clear(), "6 of 6 tensors are missing"),
    ],
)
def test_an_adapter_that_does_not_fit_is_not_copied(tmp_path, change, message):
    save_adapter(mlp_of_rank(3), tmp_path)
    change_tensors(change)(tmp_path)
    target, before = mlp_of_rank(3, seed=2), mlp_of_rank(3, seed=2)
    with pytest.raises(ValueError, match=message):
        copy_adapter(target, tmp_path)
    assert torch.equal(target(MLP.inputs()), before(MLP.inputs()))


def test_the_average_is_the_weighted_mean_of_the_factors(tmp_path):
    for seed in (1, 2, 3):
        save_adapter(mlp_of_rank(3, seed=seed), tmp_path / str(seed))
    folders = [tmp_path / str(seed) for seed in (1, 2, 3)]
    average_adapters(folders, tmp_path / "mean", [2, 1, 1], torch.float16)
    parts = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    mean = load_file(tmp_path / "mean" / "adapter_model.safetensors")
    assert mean.keys() == parts[0].keys()
    for key, value in mean.items():
        expected = (
            0.5 * parts[0][key].double() + 0.25 * parts[1][key].double() + 0.25 * parts[2][key].double()
        )
        assert torch.equal(value, expected.half())
    config = (tmp_path / "mean" / "adapter_config.json").read_text()
    assert config == (folders[0] / "adapter_config.json").read_text()
    PeftModel.from_pretrained(MLP.model(), tmp_path / "mean")


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ("a", None, "1 adapters and 1 weights; give two or more"),
        ("ab", [1, 2, 3], "2 adapters and 3 weights"),
        ("ab", [0, 0], "must be zero or more, and not all zero"),
        ("ab", [1, -1], "must be zero or more"),
        ("ac", None, r"c/adapter_model.safetensors: does not go with .*0.lorad_A has shape \(12, 4\)"),
        ("ad", None, "d/adapter_model.safetensors: does not go with .*tensors are missing"),
        ("ax", None, "x/adapter_config.json: cannot read"),
    ],
)
def test_what_cannot_be_averaged_is_told_and_nothing_written(tmp_path, names, weights, message):
    for name, model in zip(
        "abcd", (mlp_of_rank(3), mlp_of_rank(3), mlp_of_rank(4), mlp_of_rank(3, "0")), strict=True
    ):
        save_adapter(model, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        average_adapters([tmp_path / name for name in names], tmp_path / "mean", weights)
    assert not (tmp_path / "mean").exists()
