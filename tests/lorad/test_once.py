"""Weights turned once: the same results, fewer rotations, never those of old angles."""

import copy

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from wadi.lorad import LoRaDConfig, rotated_once
from wadi.lorad import rotation as rotation_module
from wadi.lorad.rotation import angle_gradient, rotated_weight


class Net(nn.Module):
    def __init__(self, hidden=6):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)  # fan-in 18
        self.odd = nn.Linear(7, hidden)
        self.first = Conv1D(hidden, 16)
        self.again = nn.Linear(hidden, hidden)

    def forward(self, x):
        x = self.conv(x).flatten(1)[:, :16]
        x = self.first(x)
        x = self.again(self.again(x).tanh())
        return self.odd(torch.cat([x, x[:, :1]], 1))


def net(dtype=torch.float64, adapters=("default",)):
    torch.manual_seed(0)
    model = Net().to(dtype)
    for name in adapters:
        config = LoRaDConfig(r=2, target_modules=["conv", "odd", "first", "again"], init_weights=False)
        inject_adapter_in_model(config, model, name)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for layer in layers(model):
        layer.set_adapter(list(adapters))
        layer.base_layer.requires_grad_(False)
    return model, torch.randn(3, 2, 4, 4, dtype=dtype)


def layers(model):
    return [module for module in model.modules() if hasattr(module, "lorad_A")]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [("default",), ("default", "other")])
def test_same_results_and_gradients(adapters):
    model, x = net(adapters=adapters)
    for layer in layers(model):
        layer.set_scale("default", 0.5)
    expected = model(x)
    expected.square().sum().backward()
    before = gradients(model)
    model.zero_grad()
    with rotated_once(model):
        result = model(x)
    # backward may come later: what it needs is saved
    result.square().sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    after = gradients(model)
    assert set(after) == set(before)
    assert len(after) == 8 * len(adapters)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-9, atol=1e-12)


def test_gradient_of_the_angles_by_autograd_of_the_equations():
    torch.manual_seed(0)
    for columns in (6, 7):
        weight = torch.randn(5, columns, dtype=torch.float64)
        theta = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        o, e = weight[:, 0:6:2], weight[:, 1:6:2]
        pairs = [o * theta.cos() - e * theta.sin(), o * theta.sin() + e * theta.cos()]
        turned = torch.cat([torch.stack(pairs, 2).flatten(1), weight[:, 6:]], 1)
        grad = torch.randn_like(turned)
        (expected,) = torch.autograd.grad(turned, theta, grad)
        torch.testing.assert_close(angle_gradient(turned.detach(), grad), expected)


def test_once_for_all_uses(rotations):
    model, x = net(torch.float32)
    model(x).sum().backward()
    # four layers, one of them twice, each forward and backward
    assert len(rotations) == 10
    rotations.clear()
    with rotated_once(model):
        for _ in range(3):
            model(x).sum().backward()
        with torch.no_grad():
            model(x)
    assert len(rotations) == 4


def test_checkpointing_recomputes_with_the_same_weight(rotations):
    model, x = net(torch.float32)
    x.requires_grad_()
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    rotations.clear()
    with rotated_once(model):
        checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert len(rotations) == 4
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def change_a_parameter(model):
    with torch.no_grad():
        model.again.lorad_A["default"].add_(0.3)


def change_the_scale(model):
    model.again.set_scale("default", -2.0)


def change_the_base(model):
    model.again.base_layer.weight.data = model.again.base_layer.weight + 1


def disable(model):
    for layer in layers(model):
        layer.enable_adapters(False)


def merge(model):
    for layer in layers(model):
        layer.merge()


def put_another_in_its_place(model):
    parameter = model.again.lorad_B["default"]
    model.again.lorad_B["default"] = nn.Parameter(parameter.detach() * 3)


@pytest.mark.parametrize(
    "change",
    [change_a_parameter, change_the_scale, change_the_base, disable, merge, put_another_in_its_place],
    ids=lambda change: change.__name__,
)
def test_never_the_weight_of_old_angles(change):
    model, x = net()
    other = copy.deepcopy(model)
    with torch.no_grad(), rotated_once(model) as weights:
        before = model(x)
        change(model), change(other)
        expected = other(x)
        assert torch.allclose(before, expected) == (change is merge)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        weights.refresh()
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_nothing_turns_what_is_merged_or_disabled(rotations):
    model, x = net()
    merge(model)
    rotations.clear()
    with torch.no_grad(), rotated_once(model):
        model(x)
    model(x)
    assert not rotations
    model, x = net()
    disable(model)
    with torch.no_grad(), rotated_once(model):
        model(x)
    assert not rotations


def test_a_trainable_base_gets_its_gradient():
    model, x = net()
    model.again.base_layer.weight.requires_grad_()
    model(x).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with rotated_once(model):
        model(x).sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
    assert "again.base_layer.weight" in expected


def test_nothing_stays_afterwards():
    model, x = net()
    with pytest.raises(KeyError), rotated_once(model):
        raise KeyError
    assert all(layer.kept is None for layer in layers(model))
    with rotated_once(model, enabled=False):
        assert all(layer.kept is None for layer in layers(model))
    copy.deepcopy(model)(x)


def test_compiles_without_a_break(rotations):
    model, x = net(torch.float32)
    expected = model(x)
    expected.square().sum().backward()
    before = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    rotations.clear()
    with rotated_once(model, unchecked=True):
        assert len(rotations) == 4
        result = compiled(x)
        result.square().sum().backward()
    assert len(rotations) == 4
    torch.testing.assert_close(result, expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, before[name], rtol=1e-4, atol=1e-6)


def test_autocast():
    model, x = net(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with rotated_once(model):
            result = model(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected)


def test_the_weight_keeps_its_dtype():
    weight, A, B = torch.randn(4, 6).bfloat16(), torch.randn(4, 2), torch.randn(2, 3)
    turned = rotated_weight(weight, [rotation_module.Factors(A, B)])
    assert turned.dtype == torch.bfloat16
    assert angle_gradient(turned, torch.ones(4, 6).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("change", [change_a_parameter, change_the_scale, disable], ids=lambda f: f.__name__)
def test_compiled_code_does_not_use_what_it_cannot_check(change):
    model, x = net(torch.float32)
    other = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), rotated_once(model):
        compiled(x)
        change(model), change(other)
        torch.testing.assert_close(compiled(x), other(x))


def test_a_parameter_in_the_place_of_another_is_not_taken_for_it():
    model, _ = net()
    layer = model.again
    with torch.no_grad(), rotated_once(model) as weights:
        for _ in range(300):
            weights.refresh()
            shape = layer.lorad_A["default"].shape
            del layer.lorad_A["default"]
            layer.lorad_A["default"] = nn.Parameter(torch.randn(shape, dtype=torch.float64))
            assert not layer.kept.fits(layer.base_layer.weight, layer.active_factors())


def test_second_derivatives_are_refused_not_wrong():
    model, x = net()
    with rotated_once(model):
        loss = model(x).square().sum()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, list(layers(model)[0].lorad_A.parameters()), create_graph=True)


def test_a_copy_made_inside_keeps_nothing():
    model, x = net()
    with rotated_once(model) as weights:
        other = copy.deepcopy(model)
        assert all(layer.kept is None for layer in layers(other))
        assert all(layer.kept is not None for layer in layers(model))
    torch.testing.assert_close(other(x), model(x))
    with pytest.raises(RuntimeError, match="inside the with block"):
        weights.refresh()


def test_diffusers_average_is_seen_after_a_refresh():
    model, x = net()
    adapter = [p for p in model.parameters() if p.requires_grad]
    average = EMAModel([p * 2 for p in adapter])
    with torch.no_grad(), rotated_once(model) as weights:
        average.copy_to(adapter)
        weights.refresh()
        inside = model(x)
    torch.testing.assert_close(inside, model(x))


def test_a_model_built_for_inference():
    with torch.inference_mode():
        model, x = net()
        expected = model(x)
        with rotated_once(model):
            torch.testing.assert_close(model(x), expected)
