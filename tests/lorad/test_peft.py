"""Everything that a PEFT user does with an adapter, on a table of tiny models."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

from tests.lorad.cases import CASES, Case, gpt2, mlp, numbers
from wadi import LoRaDConfig
from wadi.lorad import LoRaDConv, LoRaDLayer

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
MLP, CONVOLUTIONS = CASES[0], CASES[5]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def adapted(case: Case, seed: int = 1, **options) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(case.model(), case.config(**options))


def lorad_layers(model: nn.Module) -> dict[str, LoRaDLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRaDLayer)}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: layer.get_base_layer().weight.detach().clone() for name, layer in lorad_layers(model).items()
    }


@every_case
def test_identity_at_first_then_it_turns(case):
    x, base = case.inputs(), case.model()
    expected = case.output(base, x)
    model = adapted(case, init_weights=True)
    assert torch.equal(case.output(model, x), expected)
    assert len(lorad_layers(model)) == case.layers
    assert not torch.allclose(case.output(adapted(case), x), expected, **CLOSE)


@every_case
def test_parameters_and_what_trains(case):
    model = adapted(case)
    for name, layer in lorad_layers(model).items():
        weight = layer.get_base_layer().weight
        out_features = (
            layer.get_base_layer().nf if "c_attn" in name and weight.shape[0] == 16 else weight.shape[0]
        )
        assert layer.lorad_A["default"].shape[1] == layer.r["default"]
        if isinstance(layer, LoRaDConv) or isinstance(layer.get_base_layer(), nn.Linear):
            r = layer.r["default"]
            count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
            assert count == r * (out_features + weight[0].numel() // 2)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lorad_" in name or "modules_to_save" in name for name in trainable)

    case.output(model, case.inputs()).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@every_case
def test_merge_equals_forward_keeps_norms_and_unmerge_restores_the_bits(case):
    x = case.inputs()
    model = adapted(case).eval()
    originals, expected = base_weights(model), case.output(model, x)
    parameters = {name: layer.get_base_layer().weight for name, layer in lorad_layers(model).items()}
    model.merge_adapter()
    torch.testing.assert_close(case.output(model, x), expected, **CLOSE)
    for name, layer in lorad_layers(model).items():
        merged, original = (layer._as_matrix(w.detach()).double() for w in (layer.weight, originals[name]))
        torch.testing.assert_close(merged.norm(dim=1), original.norm(dim=1), rtol=2**-21, atol=0)
        assert not torch.equal(merged, original)
    model.unmerge_adapter()
    for name, layer in lorad_layers(model).items():
        assert layer.get_base_layer().weight is parameters[name]
        assert torch.equal(layer.get_base_layer().weight, originals[name])
    assert torch.equal(case.output(model, x), expected)


@every_case
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_returns_the_stock_model(case, safe_merge):
    x = case.inputs()
    model = adapted(case).eval()
    expected = case.output(model, x)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is type(case.model())
    assert [name for name, _ in merged.named_parameters()] == [
        name for name, _ in case.model().named_parameters()
    ]
    torch.testing.assert_close(case.output(merged, x), expected, **CLOSE)


@every_case
def test_save_and_load(case, tmp_path):
    x = case.inputs()
    model = adapted(case).eval()
    expected = case.output(model, x)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORAD"
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")} <= {
        "lorad_A",
        "lorad_B",
        "weight",
        "bias",
    }
    assert isinstance(PeftConfig.from_pretrained(tmp_path), LoRaDConfig)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(case.model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(case.output(loaded, x), expected)
        assert not any(p.requires_grad for p in loaded.parameters())


@every_case
def test_two_adapters_add_their_angles(case):
    x = case.inputs()
    model = adapted(case).eval()
    torch.manual_seed(2)
    model.add_adapter("other", case.config())
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs[name] = case.output(model, x)
    assert not torch.allclose(outputs["default"], outputs["other"], **CLOSE)

    if case.options.get("modules_to_save"):
        return  # PEFT lets only one adapter be active on a saved module
    base_model = model.base_model
    base_model.set_adapter(["default", "other"])
    both = case.output(model, x)
    base_model.merge_adapter()
    torch.testing.assert_close(case.output(model, x), both, **CLOSE)
    base_model.unmerge_adapter()
    # merged one after the other is merged at once
    base_model.merge_adapter(["other"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base_model.merge_adapter(["default"])
    torch.testing.assert_close(case.output(model, x), both, **CLOSE)
    base_model.unmerge_adapter()

    model.delete_adapter("default")
    assert torch.equal(case.output(model, x), outputs["other"])


@every_case
def test_disable_adapter(case):
    x = case.inputs()
    expected = case.output(case.model(), x)
    model = adapted(case).eval()
    turned = case.output(model, x)
    with model.disable_adapter():
        assert torch.equal(case.output(model, x), expected)
    assert torch.equal(case.output(model, x), turned)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(case.output(model, x), expected)
    model.unload()


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_and_double_precision_models(case, dtype, autocast_adapter_dtype):
    x = case.inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    torch.manual_seed(1)
    model = get_peft_model(
        case.model().to(dtype), case.config(), autocast_adapter_dtype=autocast_adapter_dtype
    )
    held = torch.float32 if autocast_adapter_dtype and dtype != torch.float64 else dtype
    assert {layer.lorad_A["default"].dtype for layer in lorad_layers(model).values()} == {held}
    if case.options.get("modules_to_save") and held != dtype:
        return  # PEFT holds the copy of the saved module in float32 too: it needs autocast
    out = case.output(model, x)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    originals = base_weights(model)
    for _ in range(3):
        model.merge_adapter()
        torch.testing.assert_close(case.output(model, x), out)
        model.unmerge_adapter()
    for name, layer in lorad_layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, originals[name])


@every_case
def test_autocast(case):
    x = case.inputs()
    model = adapted(case)
    exact = case.output(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.output(model, x)
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.05)
    out.float().square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == torch.float32, name
            assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("case", [MLP, CONVOLUTIONS], ids=lambda case: case.name)
def test_gradient_checkpointing_changes_no_gradient(case):
    model, x = adapted(case), case.inputs().requires_grad_()
    grads = []
    for run in (
        model,
        lambda x: checkpoint(model, x, use_reentrant=False),
        lambda x: checkpoint(model, x, use_reentrant=True),
    ):
        model.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        grads.append([x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_convolution_is_the_equation():
    """A grouped, circularly padded convolution with its flattened weight turned pair by pair."""
    model = adapted(CONVOLUTIONS)
    layer = lorad_layers(model)["base_model.model.grouped"]
    x = numbers(2, 8, 5, 5)
    theta = (layer.lorad_A["default"] @ layer.lorad_B["default"]).detach()
    flat = layer.weight.detach().flatten(1).clone()
    turned = flat.clone()
    for i in range(flat.shape[1] // 2):
        o, e = flat[:, 2 * i], flat[:, 2 * i + 1]
        turned[:, 2 * i] = o * theta[:, i].cos() - e * theta[:, i].sin()
        turned[:, 2 * i + 1] = o * theta[:, i].sin() + e * theta[:, i].cos()
    stock = copy.deepcopy(layer.base_layer)
    stock.weight.data = turned.view(stock.weight.shape)
    torch.testing.assert_close(layer(x), stock(x), **CLOSE)


def test_scale_multiplies_the_angle():
    model = adapted(MLP)
    x = MLP.inputs()
    base = MLP.output(MLP.model(), x)
    half = copy.deepcopy(model)
    for layer in lorad_layers(half).values():
        layer.lorad_A["default"].data *= 0.5
    for layer in lorad_layers(model).values():
        layer.set_scale("default", 0.5)
    torch.testing.assert_close(model(x), half(x), **CLOSE)
    for layer in lorad_layers(model).values():
        layer.scale_layer(0.0)
    torch.testing.assert_close(model(x), base, rtol=0, atol=0)
    for layer in lorad_layers(model).values():
        layer.unscale_layer()
        layer.scale_layer(4.0)
        layer.unscale_layer(4.0)
        assert layer.scaling == {"default": 1.0}


def test_merge_remembers_its_scale_and_survives_a_deleted_adapter():
    model = adapted(MLP)
    x = MLP.inputs()
    torch.manual_seed(2)
    model.add_adapter("other", MLP.config())
    for layer in lorad_layers(model).values():
        layer.set_scale("default", 0.5)
    model.base_model.set_adapter(["default", "other"])
    expected = model(x)
    originals = base_weights(model)
    model.merge_adapter(["default"])
    for layer in lorad_layers(model).values():
        layer.set_scale("default", 7.0)
        layer.delete_adapter("default")
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    torch.testing.assert_close(model(x), expected, **CLOSE)
    model.unmerge_adapter()
    assert all(torch.equal(w, originals[name]) for name, w in base_weights(model).items())


@pytest.mark.parametrize("case", [MLP, CONVOLUTIONS, CASES[7]], ids=lambda case: case.name)
def test_weighted_adapter_is_exact(case):
    model = adapted(case).eval()
    torch.manual_seed(2)
    model.add_adapter("other", case.config(r=2, **({"target_modules": ["0", "4"]} if case is MLP else {})))
    for layer in lorad_layers(model).values():
        layer.set_scale("default", 2.0)
    model.add_weighted_adapter(["default", "other"], [0.3, -0.6], "mix")
    model.set_adapter("mix")
    mixed = case.output(model, case.inputs())
    for layer in lorad_layers(model).values():
        assert layer.r["mix"] == sum(layer.r[name] for name in ("default", "other") if name in layer.r)
        layer.set_scale("default", 0.3 * 2.0)
        layer.set_scale("other", -0.6)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(mixed, case.output(model, case.inputs()), **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "nobody"], [1.0, 1.0], "mix"), "must be among"),
        (([], [], "mix"), "must be among"),
        ((["default"], [1.0], "default"), "already exists"),
        ((["default"], [1.0, 2.0], "mix"), "need as many weights"),
    ],
)
def test_weighted_adapter_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapted(MLP).add_weighted_adapter(*arguments)


@pytest.mark.parametrize("case", [CASES[1], CASES[7]], ids=lambda case: case.name)
def test_lora_conversion_at_full_rank(case):
    """At full rank a LoRA holds the whole difference of the weights."""
    model = adapted(case).eval()
    x = case.inputs()
    assert model.supports_lora_conversion()
    ranks = {min(layer.weight.shape) for layer in lorad_layers(model).values()}
    config, state_dict = convert_to_lora(model, rank=min(ranks))
    if len(ranks) == 1:
        base = case.model()
        inject_adapter_in_model(config, base)
        set_peft_model_state_dict(base, state_dict)
        torch.testing.assert_close(case.output(base, x), case.output(model, x), rtol=1e-4, atol=1e-4)


def test_lora_conversion_refuses_convolutions():
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(CONVOLUTIONS), rank=2)


def test_delta_weight_is_merged_minus_original():
    for case in (MLP, CONVOLUTIONS, CASES[7]):
        model = adapted(case)
        deltas = {name: layer.get_delta_weight("default") for name, layer in lorad_layers(model).items()}
        originals = base_weights(model)
        model.merge_adapter()
        for name, layer in lorad_layers(model).items():
            torch.testing.assert_close(layer.weight - originals[name], deltas[name], rtol=0, atol=1e-6)
            assert torch.equal(layer.get_delta_weight("default"), deltas[name])


@pytest.mark.parametrize("bias", ["all", "lorad_only"])
def test_trained_biases(bias, tmp_path):
    case = CASES[1]
    model = adapted(case, bias=bias)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    prefix = "base_model.model."
    assert (
        trainable
        == {
            "all": {f"{prefix}0.base_layer.bias", f"{prefix}2.bias"},
            "lorad_only": {f"{prefix}0.base_layer.bias"},
        }[bias]
    )
    model(case.inputs()).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p -= 0.1 * p.grad
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.model(), tmp_path)
    assert torch.equal(loaded(case.inputs()), model(case.inputs()))


def test_second_adapter_on_all_linear_layers_of_an_adapted_model():
    for make in (mlp, gpt2):
        model = get_peft_model(make(), LoRaDConfig(r=2, target_modules="all-linear"))
        model.add_adapter("other", LoRaDConfig(r=2, target_modules="all-linear"))
        assert all(set(layer.r) == {"default", "other"} for layer in lorad_layers(model).values())


def test_deleting_the_last_adapter_leaves_the_base():
    model = inject_adapter_in_model(MLP.config(), MLP.model())
    for layer in lorad_layers(model).values():
        layer.delete_adapter("default")
        assert not any(vars(layer)[name] for name in ("r", "scaling"))
        assert not list(layer.lorad_A.keys())
    assert torch.equal(model(MLP.inputs()), MLP.model()(MLP.inputs()))


def test_config_and_model_pickle_and_copy(tmp_path):
    config = MLP.config(rank_pattern={"2": 4})
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert copied == config
    config.save_pretrained(tmp_path)
    loaded = LoRaDConfig.from_pretrained(tmp_path)
    assert (loaded.r, loaded.rank_pattern, loaded.target_modules) == (3, {"2": 4}, "all-linear")
    model = adapted(MLP)
    assert torch.equal(pickle.loads(pickle.dumps(model))(MLP.inputs()), model(MLP.inputs()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "at least 1"),
        ({"rank_pattern": {"q": 0}}, "at least 1"),
        ({"bias": "some"}, "`bias` must be"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "`layers_to_transform` cannot"),
        ({"target_modules": "all-linear", "layers_pattern": "h"}, "`layers_pattern` cannot"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "`layers_pattern` needs"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LoRaDConfig(**options)


class Quantized(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 4)
        self.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (
            nn.Embedding(4, 8),
            ValueError,
            r"Target module Embedding\(4, 8\) is not supported. Currently, only",
        ),
        (nn.LayerNorm(4), ValueError, "is not supported"),
        (nn.ConvTranspose2d(4, 4, 3), ValueError, "is not supported"),
        (Quantized(), TypeError, "quantized"),
        (NonDynamicallyQuantizableLinear(4, 4), TypeError, "exclude"),
        (nn.Linear(1, 4), ValueError, "fan-in of 1"),
        (nn.Conv2d(4, 4, 1, groups=4), ValueError, "fan-in of 1"),
    ],
    ids=[
        "embedding",
        "norm",
        "transposed",
        "quantized",
        "output of MultiheadAttention",
        "one input",
        "depthwise 1x1",
    ],
)
def test_unsupported_layers(layer, error, message):
    with pytest.raises(error, match=message):
        get_peft_model(nn.Sequential(layer), LoRaDConfig(target_modules=["0"]))


def test_other_adapters_are_not_wrapped():
    from peft import LoraConfig

    model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), mlp(), adapter_name="lora_one")
    with pytest.raises(TypeError, match="merge or unload"):
        inject_adapter_in_model(LoRaDConfig(target_modules=["0"]), model, adapter_name="b")
