"""What a layer promises whatever happens around it: merging next to a LoRA, mixed batches, its kind."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from tests.lorad.cases import CASES, numbers
from wadi.lorad import LoRaDConfig, LoRaDConv, LoRaDLayer, LoRaDLinear
from wadi.lorad.rotation import rotated_weight

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LAYERS = {
    "linear": lambda: nn.Linear(7, 6),
    "convolution": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "line": lambda: nn.Conv1d(3, 6, 3),
    "volume": lambda: nn.Conv3d(2, 6, (1, 3, 2)),
}


def adapted(make: Callable[[], nn.Module], adapters=("a",), lora: bool = False) -> nn.Sequential:
    """A layer with LoRaD adapters, and with a LoRA around them on request, as diffusers nests them."""
    torch.manual_seed(0)
    model = nn.Sequential(make())
    for name in adapters:
        config = LoRaDConfig(r=3, target_modules=["0"], init_weights=False)
        inject_adapter_in_model(config, model, adapter_name=name)
    if lora:
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        inject_adapter_in_model(config, model, adapter_name="lora")
    return model


def lorad(model: nn.Module) -> LoRaDLayer:
    return next(module for module in model.modules() if isinstance(module, LoRaDLayer))


def turned(weight: torch.Tensor, layer: LoRaDLayer, names: list[str]) -> torch.Tensor:
    matrix = weight.double().flatten(1)
    return rotated_weight(matrix, layer._factors(names)).view(weight.shape) if names else weight.double()


@pytest.mark.filterwarnings("ignore:Already")
@pytest.mark.parametrize(
    "make", [LAYERS["linear"], lambda: nn.Conv2d(3, 6, 3, padding=1)], ids=["linear", "convolution"]
)
@given(actions=st.lists(st.sampled_from(["a", "b", "unmerge", "lora"]), max_size=8))
@example(actions=["a", "lora", "b", "unmerge", "lora"])
def test_merging_in_any_order_next_to_a_lora(make, actions):
    """The weight is what was found, turned by what is merged, plus what the LoRA has added since."""
    model = adapted(make, ("a", "b"), lora=True)
    layer, outer = lorad(model), model[0]
    weight = layer.get_base_layer().weight
    original, delta = weight.detach().clone(), outer.get_delta_weight("lora").detach().double()
    found, added, merged = original.double(), torch.zeros_like(delta), []
    for action in actions:
        if action == "lora":
            added = added + (-delta if outer.merged else delta)
            outer.unmerge() if outer.merged else outer.merge(adapter_names=["lora"])
        elif action == "unmerge":
            layer.unmerge()
            merged = []
        elif action not in merged:
            layer.merge(adapter_names=[action])
            if not merged:
                found, added = found + added, torch.zeros_like(delta)
            merged.append(action)
        torch.testing.assert_close(weight.double(), turned(found, layer, merged) + added, **CLOSE)
    assert layer.get_base_layer().weight is weight
    if "lora" not in actions and merged:
        layer.unmerge()
    if "lora" not in actions:
        assert torch.equal(weight, original)


def trained(model):
    lorad(model).lorad_A["a"].data += 1.0
    return model


def rescaled(model):
    lorad(model).set_scale("a", 7.0)
    return model


def deleted(model):
    lorad(model).delete_adapter("a")
    return model


def broken(model):
    lorad(model).lorad_A["a"].data.fill_(torch.nan)
    return model


WHILE_MERGED = {
    "nothing": lambda model: model,
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "widened": lambda model: model.double(),
    "narrowed": lambda model: model.bfloat16(),
    "narrowed and back": lambda model: model.half().float(),
    "trained": trained,
    "rescaled": rescaled,
    "deleted": deleted,
    "broken": broken,
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("change", WHILE_MERGED.values(), ids=WHILE_MERGED)
def test_unmerging_restores_the_bits_whatever_happened_meanwhile(make, change):
    model = adapted(make)
    expected = change(nn.Sequential(lorad(model).get_base_layer(), lorad(adapted(make))))[0].weight
    expected = expected.detach().clone()
    model = adapted(make)
    lorad(model).merge()
    model = change(model)
    lorad(model).unmerge()
    assert torch.equal(lorad(model).weight, expected)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_merging_keeps_the_parameter_that_others_hold(mode, requires_grad):
    layer = lorad(adapted(LAYERS["linear"]))
    weight = layer.get_base_layer().weight.requires_grad_(requires_grad)
    original, x = weight.detach().clone(), numbers(5, 7)
    with mode():
        layer.merge()
    assert layer.get_base_layer().weight is weight
    assert (weight.requires_grad, weight.is_leaf) == (requires_grad, True)
    assert not {"_original", "original"} & layer.state_dict().keys()
    layer.unmerge()
    assert torch.equal(weight, original)
    layer(x).sum().backward()
    assert (weight.grad is not None) == requires_grad
    assert layer.lorad_A["a"].grad.abs().max() > 0


def test_backward_through_a_weight_that_was_merged_since_raises():
    layer = lorad(adapted(LAYERS["linear"]))
    loss = layer(numbers(5, 7)).sum()
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_weights_are_merged_together():
    """As with PEFT's LoRA: whoever holds the Parameter sees the merged weight."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    original = model[1].weight.detach().clone()
    config = LoRaDConfig(r=2, target_modules=["0"], init_weights=False)
    layer = lorad(inject_adapter_in_model(config, model))
    layer.merge()
    assert torch.equal(model[1].weight, layer.weight)
    assert not torch.equal(model[1].weight, original)
    layer.unmerge()
    assert torch.equal(model[1].weight, original)


@pytest.mark.parametrize("operation", ["merge", "unmerge"])
def test_an_offloaded_weight_is_refused(operation):
    layer = lorad(adapted(LAYERS["linear"]))
    if operation == "unmerge":
        layer.merge()
    layer.to("meta")
    with pytest.raises(ValueError, match="has no values"):
        getattr(layer, operation)()


def test_the_broken_adapter_is_named_and_nothing_is_merged():
    layer = lorad(adapted(LAYERS["linear"], ("a", "b", "c")))
    original = layer.weight.detach().clone()
    layer.lorad_B["b"].data[0, 0] = torch.inf
    message = "^NaNs detected in the merged weights. The adapter b seems to be broken$"
    with pytest.raises(ValueError, match=message):
        layer.merge(safe_merge=True, adapter_names=["a", "b", "c"])
    assert not layer.merged
    assert torch.equal(layer.weight, original)


@pytest.mark.parametrize(
    ("base", "kind", "features"),
    [
        (nn.Linear(6, 4), LoRaDLinear, (6, 4)),
        (nn.Conv1d(6, 4, 3), LoRaDConv, (6, 4)),
        (nn.Conv2d(6, 4, 3, groups=2), LoRaDConv, (6, 4)),
        (nn.Conv3d(6, 4, 3), LoRaDConv, (6, 4)),
    ],
    ids=["linear", "1d", "2d", "3d"],
)
def test_features_are_those_of_the_base(base, kind, features):
    layer = lorad(adapted(lambda: base))
    assert type(layer) is kind
    assert (layer.in_features, layer.out_features) == features


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mixed_batches_give_each_sample_its_adapter(case):
    torch.manual_seed(1)
    model = get_peft_model(case.model(), case.config()).eval()
    model.add_adapter("other", case.config())
    names = ["other", "__base__", "default", "other", "default"]
    x = case.inputs()
    x = torch.cat([x, x, x])[: len(names)]
    expected = []
    with torch.no_grad():
        for index, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected.append(case.output(model, x)[index])
            else:
                model.set_adapter(name)
                expected.append(case.output(model, x)[index])
        mixed = model(x, adapter_names=names)
    torch.testing.assert_close(getattr(mixed, "logits", mixed), torch.stack(expected), **CLOSE)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_mixed_batches_where_a_layer_lacks_the_adapter():
    case = CASES[0]
    torch.manual_seed(1)
    model = get_peft_model(case.model(), case.config()).eval()
    model.add_adapter("other", case.config(target_modules=["2"]))
    x = case.inputs()
    model.set_adapter("other")
    expected = model(x)
    torch.testing.assert_close(model(x, adapter_names=["other"] * len(x)), expected, **CLOSE)


def test_mixed_batches_of_beam_search():
    """The decoder sees every sample once for each beam, the encoder once."""
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(
            vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    config = LoRaDConfig(r=8, target_modules=["q", "v"], init_weights=False, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(base, config).eval()
    model.add_adapter("other", config)
    for layer in model.modules():
        if isinstance(layer, LoRaDLayer):
            layer.set_scale("other", -5.0)
    names, x = ["other", "default", "__base__"], torch.arange(3, 18).reshape(3, 5)
    options = {"num_beams": 2, "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    mixed = model.generate(input_ids=x, adapter_names=names, **options)
    for index, name in enumerate(names[:2]):
        model.set_adapter(name)
        assert torch.equal(mixed[index], model.generate(input_ids=x, **options)[index])
    with model.disable_adapter():
        assert torch.equal(mixed[2], model.generate(input_ids=x, **options)[2])


@pytest.mark.parametrize(
    ("state", "names", "message"),
    [
        ("eval", ["default"], "Length of `adapter_names` should be the same .* got 1 and 5"),
        ("eval", ["default"] * 4 + ["nobody"], "non-existing adapter.*: nobody; there are default"),
        ("train", ["default"] * 5, "in training mode"),
        ("merged", ["default"] * 5, "please call `unmerge_adapter` first"),
    ],
    ids=["length", "name", "training", "merged"],
)
def test_mixed_batches_refuse(state, names, message):
    model = get_peft_model(CASES[0].model(), CASES[0].config()).train(state == "train")
    if state == "merged":
        model.merge_adapter()
    with pytest.raises(ValueError, match=message):
        model(CASES[0].inputs(), adapter_names=names)
    assert not any(module._forward_pre_hooks for module in model.modules())
