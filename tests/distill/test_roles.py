"""Three views of one base: the same storages, separate adapters, gradients under checkpointing."""

import copy

import pytest
import torch

from tests.tiny import tiny_pipeline
from wadi.backbones import fake_config, student_config
from wadi.distill.roles import build_roles, enable_gradient_checkpointing, trainable, view
from wadi.lorad import LoRaDLayer


@pytest.fixture
def unet():
    return tiny_pipeline().unet


def build(unet, seed=0):
    return build_roles(unet, student_config(unet, r=2), fake_config(unet, r=3), seed)


def call(network, x):
    t, text = torch.full((len(x),), 500), torch.ones(len(x), 5, 16)
    return network(x, t, encoder_hidden_states=text, return_dict=False)[0]


def base_tensors(network):
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {k.replace(".base_layer", ""): v for k, v in tensors.items() if "lorad_" not in k}


def test_views_hold_the_same_tensors(unet):
    roles = build(unet)
    teacher = base_tensors(roles.teacher)
    for network in (roles.student, roles.fake):
        own = base_tensors(network)
        assert own.keys() == teacher.keys()
        assert all(own[name] is teacher[name] for name in teacher)
        assert not any(module in set(roles.teacher.modules()) for module in network.modules())


def test_one_view_is_not_merged_but_its_copy_is(unet):
    """Merging writes in place, and the base is that of all three."""
    roles, x = build(unet), torch.randn(2, 4, 8, 8)
    expected = call(roles.teacher, x)
    with pytest.raises(ValueError, match=r"shared by several views .* copy"):
        roles.student.apply(lambda module: module.merge() if isinstance(module, LoRaDLayer) else None)
    merged = copy.deepcopy(roles.student)
    for module in merged.modules():
        if isinstance(module, LoRaDLayer):
            torch.nn.init.normal_(module.lorad_A["default"])
            module.merge()
    assert not torch.allclose(call(merged, x), expected)
    assert torch.equal(call(roles.teacher, x), expected)


def test_a_view_shares_buffers_too():
    module = torch.nn.BatchNorm1d(3)
    assert view(module).running_mean is module.running_mean


def test_only_adapters_train_and_they_are_float32(unet):
    roles = build(unet.bfloat16())
    assert not trainable(roles.teacher)
    for network in (roles.student, roles.fake):
        parameters = trainable(network)
        assert parameters
        assert all("lorad_" in name and p.dtype == torch.float32 for name, p in parameters.items())
    assert not {id(p) for p in trainable(roles.student).values()} & {
        id(p) for p in trainable(roles.fake).values()
    }


def test_untrained_views_are_the_teacher(unet):
    roles, x = build(unet), torch.randn(2, 4, 8, 8)
    expected = call(roles.teacher, x)
    torch.testing.assert_close(call(roles.student, x), expected)
    torch.testing.assert_close(call(roles.fake, x), expected)


def test_seed_decides_the_adapters_and_the_global_state_stays(unet):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (trainable(build(unet, seed).student) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_gradients_with_checkpointing_while_the_others_run(unet):
    roles, x = build(unet), torch.randn(2, 4, 8, 8)
    for network in (roles.student, roles.fake):
        for p in trainable(network).values():
            torch.nn.init.normal_(p, std=0.1)

    def gradients():
        result = []
        for network in (roles.student, roles.fake):
            loss = call(network, x).square().mean()
            with torch.no_grad():  # between forward and backward the other two views are used
                call(roles.teacher, x), call(roles.fake, x)
            result += torch.autograd.grad(loss, list(trainable(network).values()))
        return result

    expected = gradients()
    calls = []
    hook = roles.student.down_blocks[1].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for network in (roles.student, roles.fake):
        enable_gradient_checkpointing(network)
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want)
    hook.remove()
    assert len(calls) == 2  # forward, and again in backward
    assert not any(getattr(module, "gradient_checkpointing", False) for module in roles.teacher.modules())
