"""Linear layers that are stored small: norms of their rows, what they compute, and what backward keeps."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.lorad.cases import numbers
from wadi.lorad import LoRaDConfig, LoRaDLayer, load_adapter, save_adapter
from wadi.lorad.rotation import rotate, widen
from wadi.lorad.small import (
    SmallLinear,
    backend_of,
    plain_state,
    rounds_inputs,
    small_layers,
    store_small,
)

STORED = [torch.int8, torch.bfloat16]
ADAPTERS = {"no adapter": (), "one adapter": ("a",), "two adapters": ("a", "b")}


def small_net(adapters=("a",), dtype=torch.int8, fan_in=14, bias=True) -> nn.Sequential:
    """A small layer with adapters, and one after it without."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(fan_in, 12, bias=bias), nn.Linear(12, 5)
        net = nn.Sequential(*(SmallLinear(layer, dtype) for layer in layers)).requires_grad_(False)
        for name in adapters:
            config = LoRaDConfig(r=3, target_modules=["0"], init_weights=False)
            inject_adapter_in_model(config, net, adapter_name=name)
        if len(adapters) > 1:
            net[0].set_adapter(list(adapters))
    return net


def parameters(net):
    return [p for p in net.parameters() if p.requires_grad]


def run(net, x):
    """The outputs, and gradients of the input and of what is trained."""
    x = x.detach().clone().requires_grad_()
    out = net(x)
    wanted = [x, *parameters(net)]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


def in_float64(net):
    """The same function of the same adapters, by torch alone and with the stored weights widened."""
    net = copy.deepcopy(net)
    first = net[0].get_base_layer() if isinstance(net[0], LoRaDLayer) else net[0]
    trained = [p.double().detach().requires_grad_() for p in parameters(net)]
    half = len(trained) // 2
    weights = [layer.wide_weight(torch.float64) for layer in (first, net[1])]
    biases = [None if layer.bias is None else layer.bias.double() for layer in (first, net[1])]

    def call(x):
        weight = weights[0]
        if trained:
            weight = rotate(weight, sum(A @ B for A, B in zip(trained[:half], trained[half:], strict=True)))
        return F.linear(F.linear(x, weight, biases[0]), weights[1], biases[1])

    call.parameters = lambda: trained
    return call


ROWS = st.lists(
    st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=24),
    min_size=1,
    max_size=4,
).map(lambda rows: torch.tensor([(row * 24)[: len(rows[0])] for row in rows]))


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, size=st.sampled_from([1e-30, 1e-6, 1.0, 1e30]), dtype=st.sampled_from(STORED))
def test_rows_keep_their_norms_and_errors_are_bounded(rows, size, dtype):
    weight = rows.double().where(rows.abs() > 1e-6, 0).float() * size
    small, scale = store_small(weight, dtype)
    assert (small.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (len(weight), 1))
    stored = small.double() * scale.double()
    norms = weight.double().norm(dim=1)
    torch.testing.assert_close(stored.norm(dim=1), norms, rtol=1e-6, atol=0)
    # |W - Q s| <= 2 |W - Q u|, and each element of W - Q u is rounded by half a step
    step = weight.double().abs().amax(dim=1) * (1 / 127 if dtype == torch.int8 else 2**-7)
    error = (stored - weight.double()).norm(dim=1)
    assert (error <= step * weight.shape[1] ** 0.5 + 1e-6 * norms).all()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("fan_in", [14, 13], ids=["even", "odd"])
@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_outputs_and_gradients_against_float64(dtype, adapters, fan_in, bias):
    net, x = small_net(adapters, dtype, fan_in, bias), numbers(2, 5, fan_in)
    for ours, exact in zip(run(net, x), run(in_float64(net), x.double()), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_it_computes_in_the_dtype_of_its_input(adapters):
    net, x = small_net(adapters), numbers(5, 14)
    exact = run(in_float64(net), x.double())
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-6)):
        ours = run(net, x.to(dtype))
        assert ours[0].dtype == ours[1].dtype == dtype
        for mine, theirs in zip(ours, exact, strict=True):
            assert (mine.double() - theirs).norm() < bound * theirs.norm()


def test_autocast_is_followed_as_by_a_plain_layer():
    net, plain = small_net(), nn.Linear(14, 5)
    for dtype in (torch.float32, torch.float64):
        x = numbers(5, 14).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == plain.to(dtype)(x).dtype


@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_backward_keeps_no_widened_weight(adapters):
    kept = []
    net, x = small_net(adapters), numbers(2, 5, 14).requires_grad_()
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        net(x).sum()
    own = {p.data_ptr() for p in net.parameters()}
    others = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert not [t for t in others if t.is_floating_point() and t.numel() >= 12 * 14], "a weight was kept"
    assert any(tensor.dtype == torch.int8 for tensor in kept)


@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_checkpointing_gives_the_same_bits(adapters):
    net, x = small_net(adapters), numbers(2, 5, 14)

    def recomputed(x):
        return checkpoint(net, x, use_reentrant=False)

    recomputed.parameters = net.parameters
    for got, expected in zip(run(recomputed, x), run(net, x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("adapters", ADAPTERS.values(), ids=ADAPTERS)
def test_nothing_waits_for_the_data(adapters):
    """Reading a value, or a shape that depends on one, raises here, as inside a CUDA graph."""
    net = small_net(adapters)
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = run(net, torch.ones(3, 14))
    assert out[0].shape == (3, 5)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("adapters", [(), ("a",)], ids=["no adapter", "one adapter"])
def test_it_compiles_without_a_graph_break(adapters, grad):
    torch._dynamo.reset()
    net, x = small_net(adapters), numbers(3, 14)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with nullcontext() if grad else torch.no_grad():
        assert torch.equal(compiled(x), net(x))
    if grad:
        for got, expected in zip(run(compiled, x), run(net, x), strict=True):
            torch.testing.assert_close(got, expected)


CASTS = {
    "bfloat16": lambda net: net.bfloat16(),
    "half": lambda net: net.half(),
    "double": lambda net: net.double(),
    "to": lambda net: net.to(torch.bfloat16).to("cpu", torch.float32),
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_casting_changes_the_bias_alone(cast, dtype):
    net = small_net((), dtype)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    shared = SmallLinear.__new__(SmallLinear)  # as a view has it: the same Parameters in another module
    shared.__dict__ = {**net[0].__dict__, "_parameters": dict(net[0]._parameters)}
    after = cast(net).state_dict()
    for name, tensor in after.items():
        if not name.endswith("bias"):
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    if cast is not copy.deepcopy:
        assert shared.scale is net[0].scale
        assert shared.weight is net[0].weight


def test_what_cannot_be_done_to_a_small_weight_is_refused_and_changes_nothing():
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"^The weight is stored small \(int8 .*full precision.*$"):
        net[0].merge()
    model = get_peft_model(
        nn.Sequential(SmallLinear(nn.Linear(6, 4))), LoRaDConfig(r=2, target_modules=["0"])
    )
    with pytest.raises(ValueError, match="stored small"):
        model.merge_and_unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_unloading_gives_the_small_layer_back():
    net, x = nn.Sequential(SmallLinear(nn.Linear(6, 4))), numbers(3, 6)
    layer, expected = net[0], net(x)
    model = get_peft_model(net, LoRaDConfig(r=2, target_modules=["0"], init_weights=False))
    assert not torch.equal(model(x), expected)
    unloaded = model.unload()
    assert unloaded[0] is layer
    assert torch.equal(unloaded(x), expected)


def test_the_change_of_a_turned_small_weight():
    layer = small_net()[0]
    A, B = layer.lorad_A["a"], layer.lorad_B["a"]
    wide = layer.get_base_layer().wide_weight(torch.float64)
    exact = rotate(wide, A.double() @ B.double()) - wide
    torch.testing.assert_close(layer.get_delta_weight("a").double(), exact, rtol=1e-5, atol=1e-6)


def test_a_lora_of_peft_trains_on_it():
    net = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), small_net(()))
    out, *gradients = run(net, numbers(5, 14))
    assert torch.equal(out, small_net(())(numbers(5, 14)))
    assert len(gradients) == 3


def test_an_adapter_is_saved_and_loaded_as_from_a_plain_base(tmp_path):
    small = small_net(("default",))
    save_adapter(small, tmp_path / "adapter")
    plain = nn.Sequential(nn.Linear(14, 12), nn.Linear(12, 5))
    for layer, stored in zip(plain, (small[0].get_base_layer(), small[1]), strict=True):
        layer.weight.data, layer.bias.data = stored.wide_weight(), stored.bias.data
    assert plain_state(small_net(())).keys() == plain.state_dict().keys()
    load_adapter(plain, tmp_path / "adapter")
    x = numbers(5, 14)
    torch.testing.assert_close(plain(x), small(x))
    plain[0].merge()
    torch.testing.assert_close(plain(x), small(x))


def test_names_and_shapes_are_those_of_full_precision():
    net = nn.Sequential(nn.Linear(14, 12), nn.Conv2d(3, 4, 3), nn.Linear(12, 5, bias=False))
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    assert {name: tensor.shape for name, tensor in plain_state(net).items()} == shapes
    net[0], net[2] = SmallLinear(net[0]), SmallLinear(net[2])
    assert list(small_layers(net)) == ["0", "2"]
    assert {name: tensor.shape for name, tensor in plain_state(net).items()} == shapes


# --- what other libraries quantize ---


def torchao(layer):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


def torchao_float8(layer):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Float8WeightOnlyConfig())
    return layer


def bitsandbytes_8_bits(layer):
    library = pytest.importorskip("bitsandbytes")
    small = library.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    small.weight = library.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    small.bias = layer.bias
    return small.to("cpu")


def bitsandbytes_4_bits(layer):
    library = pytest.importorskip("bitsandbytes")
    small = library.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
    small.weight = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    small.bias = layer.bias
    return small.to("cpu")


@pytest.mark.parametrize(
    "quantize", [torchao, torchao_float8, bitsandbytes_8_bits, bitsandbytes_4_bits], ids=lambda f: f.__name__
)
def test_adapters_on_what_other_libraries_quantize(quantize):
    net = nn.Sequential(quantize(nn.Linear(128, 64).requires_grad_(False)))
    shapes = {"0.weight": (64, 128), "0.bias": (64,)}
    assert {name: tuple(tensor.shape) for name, tensor in plain_state(net).items()} == shapes
    inject_adapter_in_model(LoRaDConfig(r=3, target_modules=["0"], init_weights=False), net)
    layer, x = net[0], numbers(5, 128)
    weight = layer.get_base_weight().double()
    A, B = (p.double().detach().requires_grad_() for p in parameters(net))
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        net(x).sum()
    assert not [tensor for tensor in kept if tensor.numel() >= 64 * 128]
    out = F.linear(x.double(), rotate(weight, A @ B), layer.bias.double())
    exact = [out, *torch.autograd.grad(out.square().sum(), [A, B])]
    ours = run(net, x)
    for mine, theirs in zip([ours[0], *ours[2:]], exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="stored small"):
        layer.merge()


def torchao_with_inputs(layer):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig())
    return layer


@pytest.mark.parametrize(
    ("quantize", "rounds"),
    [
        (torchao, False),
        (torchao_float8, False),
        (bitsandbytes_4_bits, False),
        (bitsandbytes_8_bits, True),
        (torchao_with_inputs, True),
        (SmallLinear, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_untrained_adapter_is_the_layer_unless_the_layer_rounds_its_inputs(quantize, rounds):
    net, x = nn.Sequential(quantize(nn.Linear(128, 64).requires_grad_(False))), numbers(5, 128)
    assert rounds_inputs(net[0]) == rounds
    expected = net(x)
    inject_adapter_in_model(LoRaDConfig(r=3, target_modules=["0"]), net)
    rounds = rounds and quantize is not bitsandbytes_8_bits  # which does so on a GPU alone
    assert ((net(x) - expected).norm() > 1e-3 * expected.norm()) == rounds


class Unknown(nn.Parameter):
    """As the parameters of libraries that PEFT does not know."""


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_other_quantized_layers_are_refused_in_one_line(dtype):
    layer = nn.Linear(6, 4)
    layer.weight = Unknown(torch.ones(4, 6, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match=r"^LoRaD cannot read the weight of a Linear .*full precision\.$"):
        backend_of(layer)
    with pytest.raises(TypeError, match="LoRaD cannot read"):
        inject_adapter_in_model(LoRaDConfig(r=2, target_modules=["0"]), nn.Sequential(layer))


def test_widening_rounds_once():
    small, scale = store_small(numbers(7, 9), torch.int8)
    exact = small.double() * scale.double()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        product = exact if dtype == torch.float64 else exact.float()
        assert torch.equal(widen(small, scale, dtype), product.to(dtype))
