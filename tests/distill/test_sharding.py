"""A base that is spread over two processes (gloo), against one process that computes the same shares.

The roles are compared with views of a whole base at equal ranks, where the wrong adapter would be silent.
"""

import os
import shutil
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests.backbones.cases import CASES, make, noise
from tests.distill.test_processes import checkpoint, config, metrics, two
from tests.processes import start_two
from tests.tiny import PROMPTS, tiny_pipeline
from wadi.backbones import UNetBackbone, student_config
from wadi.backbones.storage import store_base
from wadi.distill import DistillConfig, distill, sharding
from wadi.distill.checks import check_sharding
from wadi.distill.roles import (
    Roles,
    build_roles,
    build_sharded_roles,
    enable_gradient_checkpointing,
    trainable,
)
from wadi.distill.sharding import FAKE, STUDENT, enable_shared_checkpointing, share_roles
from wadi.errors import WadiError
from wadi.lorad.io import copy_adapter, save_adapter


def adapters(unet, r=2):
    return student_config(unet, r), student_config(unet, r)


def shared(unet):
    """The three roles of one whole network."""
    return Roles(*share_roles(unet.requires_grad_(False), *adapters(unet)))


def call(network, x):
    t, text = torch.full((len(x),), 500), torch.ones(len(x), 5, 16, dtype=x.dtype)
    return network(x, t, encoder_hidden_states=text, return_dict=False)[0]


def fill(roles):
    """Angles that are not zero, the same for every way of building the roles."""
    generator = torch.Generator().manual_seed(3)
    for network in (roles.student, roles.fake):
        for parameter in trainable(network).values():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def losses(roles, x):
    """Two losses whose graphs both wait while all three roles compute."""
    both = [call(network, x).square().mean() for network in (roles.student, roles.fake)]
    with torch.no_grad():
        both += [call(network, x).square().mean() for network in (roles.teacher, roles.fake)]
    return both


def gradients(roles):
    return {
        f"{role}.{name}": p.grad.clone()
        for role in ("student", "fake")
        for name, p in trainable(getattr(roles, role)).items()
    }


def backward_inside(roles, loss):
    loss.backward()


def backward_in_another_role(roles, loss):
    with roles.teacher.active.as_role(FAKE):
        loss.backward()


def backward_in_another_thread(roles, loss):
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "backward",
    [backward_inside, backward_in_another_role, backward_in_another_thread],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_role_has_its_own_gradients(backward, checkpointing):
    """Student and fake model have equal ranks on the same layers: the wrong one would fit everywhere."""
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    whole = tiny_pipeline().unet.double()
    views, roles = build_roles(whole, *adapters(whole), 0), shared(tiny_pipeline().unet.double())
    for each in (views, roles):
        fill(each)
    if checkpointing:
        enable_shared_checkpointing(roles.student)
    expected, got = losses(views, x), losses(roles, x)
    assert [loss.item() for loss in got] == [loss.item() for loss in expected]
    assert len({loss.item() for loss in expected}) == 3  # the fake model twice
    for ours, theirs in zip(got[:2], expected[:2], strict=True):
        theirs.backward()
        backward(roles, ours)
    theirs = gradients(views)
    for name, gradient in gradients(roles).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-15)


def test_plain_checkpointing_of_a_shared_network_is_an_error():
    """Its recomputation would take no adapter, or that of another role."""
    roles = shared(tiny_pipeline().unet)
    fill(roles)
    enable_gradient_checkpointing(roles.student.network)
    loss = call(roles.student, torch.randn(2, 4, 8, 8)).mean()
    with pytest.raises(RuntimeError, match="only within as_role"):
        loss.backward()


SPREAD = {
    "blocks": (sharding.LARGE, None, True),
    "parts": (0, None, True),
    "kept activations": (sharding.LARGE, None, False),
    "int8": (sharding.LARGE, "int8", True),
}
"""Bytes above which a block is gathered in parts, precision of the base, and gradient checkpointing."""


def build_and_compare(folder):
    """Roles on a spread base have the angles and gradients of views of a whole one, and half of the base."""
    torch.distributed.init_process_group("gloo")
    for name, (large, precision, checkpointing) in SPREAD.items():
        sharding.LARGE = large
        whole = tiny_pipeline().unet.double()
        if precision is not None:
            store_base(whole, UNetBackbone.layers(whole, UNetBackbone.student_pattern), precision, "cpu")
        views = build_roles(whole, *adapters(whole), 0)
        roles = build_sharded_roles(whole, *adapters(whole), 0, UNetBackbone.blocks, torch.device("cpu"))
        base = [p for name, p in roles.teacher.network.named_parameters() if "lorad_" not in name]
        assert sum(p.to_local().numel() for p in base) == pytest.approx(
            sum(p.numel() for p in whole.parameters()) / 2, rel=0.02
        )
        for role in ("student", "fake"):
            ours, theirs = (trainable(getattr(each, role)) for each in (roles, views))
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        if checkpointing:
            enable_shared_checkpointing(roles.student)
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for each in (views, roles):
            fill(each)
            for loss in losses(each, x)[:2]:
                loss.backward()
        theirs = gradients(views)
        for key, gradient in gradients(roles).items():
            torch.testing.assert_close(gradient, theirs[key], rtol=1e-9, atol=1e-15)
        print(name)
    trainable(views.student).popitem()[1].data.fill_(0.5)
    own = folder / os.environ["RANK"]
    save_adapter(views.student, own)
    copy_adapter(roles.student.network, own, STUDENT)
    ours, theirs = trainable(roles.student), trainable(views.student)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    torch.distributed.destroy_process_group()


def test_a_spread_base_gives_the_gradients_of_a_whole_one(tmp_path):
    for process in start_two(tmp_path, build_and_compare, tmp_path):
        code, out, err = process.communicate()
        assert (code, out.splitlines()) == (0, list(SPREAD)), err


def gather(own, *_):
    for parameter, value in own.items():
        parameter.data = value


def free(own, *_):
    for parameter, value in own.items():
        parameter.data = value.new_empty(0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("large", [sharding.LARGE, 0], ids=["blocks", "parts"])
def test_weights_are_there_while_their_module_computes_and_only_then(case, large, monkeypatch):
    """As FSDP gathers them, without processes: a weight that is read elsewhere has no values."""
    monkeypatch.setattr(sharding, "LARGE", large)
    backbone = make(case)
    network, t = backbone.network, torch.full((2,), 500.0)
    asked = noise(backbone), t, backbone.encode(PROMPTS[:2])
    gathered = sharding.gathered_together(network, backbone.blocks)
    assert sum(gathered.values()) == sum(p.nbytes for p in network.parameters())
    roles = Roles(*share_roles(network, *adapters(network)))
    fill(roles)
    with torch.no_grad():
        expected = backbone.predict(roles.student, *asked)
        seen = set()
        for module in gathered:
            own = {p: p.data for p in set(module.parameters()) - seen if not p.requires_grad}
            seen |= own.keys()
            module.register_forward_pre_hook(partial(gather, own))
            module.register_forward_hook(partial(free, own))
            free(own)
        assert torch.equal(backbone.predict(roles.student, *asked), expected)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cuda_graphs": True}, "--cuda-graphs"),
        ({"compile": True}, "--compile"),
        ({"base_precision": "nf4"}, "--base-precision nf4"),
        ({"student_method": "lora"}, "--student-method"),
        ({"fake_method": "full"}, "--fake-method"),
    ],
)
def test_what_does_not_go_with_a_spread_base_is_refused(options, told):
    config = DistillConfig.of(shard_base=True, **options)
    with pytest.raises(WadiError, match=f"^--shard-base: does not go with {told}, because"):
        check_sharding(config, 2)
    check_sharding(config.replace(shard_base=False), 1)


SHARES = {"train_batch_size": 2, "max_train_steps": 2, "validation_steps": 2, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def one(teacher_folder, tmp_path_factory):
    """One process that computes the two processes' shares one after the other."""
    folder = tmp_path_factory.mktemp("one")
    return distill(config(teacher_folder, folder, gradient_accumulation_steps=2, **SHARES))


def assert_equal(run, other, step, tolerance):
    """Moments and losses of the first step that the two did apart: AdamW magnifies rounding afterwards."""
    ours, theirs = checkpoint(run, step), checkpoint(other, step)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        if name.startswith("student_optimizer") and name.endswith(".exp_avg"):
            scale = float(theirs[name].abs().max())
            torch.testing.assert_close(x, theirs[name], rtol=0, atol=tolerance * scale + 1e-12)
    ours, theirs = metrics(run)[step - 1], metrics(other)[step - 1]
    for name in ("student_loss", "fake_loss", "student_grad_norm", "fake_grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_two_processes_with_a_spread_base_are_one(teacher_folder, tmp_path, one):
    """A run of two, with its images, adapter and pipeline; one process goes on from its checkpoint."""
    options = config(teacher_folder, tmp_path, shard_base=True, **SHARES)
    codes, err = two(options, tmp_path)
    assert codes == [0, 0], err
    run = tmp_path / "run"
    assert_equal(run, one, 1, 1e-6)
    written = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) for folder in (run, one)]
    assert written[0] == written[1]
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    average = load_file(run / "checkpoints/step-000002/ema.safetensors")
    assert len(adapter) == len(average)
    for name, x in average.items():
        assert torch.equal(adapter[f"base_model.model.{name.removesuffix('.default')}"], x)

    more = {"resume_from_checkpoint": str(run), "max_train_steps": 3}
    with pytest.raises(WadiError, match="--shard-base: spreads the base over several"):
        distill(DistillConfig.of(**more))
    distill(DistillConfig.of(shard_base=False, **more))
    assert metrics(run)[-1]["step"] == 3


def test_two_processes_spread_the_base_of_a_run_of_one(tmp_path, one):
    run = shutil.copytree(one, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step-000002")
    codes, err = two(DistillConfig.of(resume_from_checkpoint=str(run), shard_base=True), tmp_path)
    assert codes == [0, 0], err
    assert_equal(run, one, 2, 1e-4)
