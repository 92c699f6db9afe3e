"""Compiled blocks against eager ones, and what compiling may not change.

Mostly without code generation ("aot_eager"), which takes a C++ compiler and minutes: the graphs are the same.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import inject_adapter_in_model
from torch._dynamo.testing import CompileCounterWithBackend

from tests.distill.test_resume import config
from tests.distill.test_trainer import make
from tests.tiny import PROMPTS, one_level_pipeline, tiny_pixart
from wadi.distill import DistillConfig, distill, regions
from wadi.errors import WadiError
from wadi.files import load_tensors
from wadi.lorad import LoRaDConfig

REGIONS = ("BasicTransformerBlock", "ResnetBlock2D")


def blocks(network):
    return [module for module in network.modules() if type(module).__name__ in REGIONS]


@pytest.fixture(scope="module")
def graphs():
    """Counts compiled graphs."""
    with pytest.MonkeyPatch.context() as patch:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        patch.setattr(regions, "BACKEND", CompileCounterWithBackend("aot_eager"))
        yield regions.BACKEND
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_every_graph_is_made_in_the_first_step(graphs):
    """Equal blocks share one; later steps, another trainer and sample grids of another size make none."""
    trainer = make(compile=True, fake_updates=1)
    assert len(blocks(trainer.student)) == len(blocks(trainer.teacher)) == 6
    trainer.step(0)
    made = graphs.frame_count
    # calls of a block: teacher; student; fake model with and without gradients
    assert 0 < made < 4 * 6
    for step in (1, 2):
        trainer.step(step)
    make(compile=True, fake_updates=1, seed=1).step(0)
    assert graphs.frame_count == made
    with regions.eager(), torch.no_grad():
        trainer.generate(torch.randn(3, *trainer.backbone.latent_shape), _three(trainer))
    assert graphs.frame_count == made


def _three(trainer):
    return {name: tensor[:1].repeat(3, *[1] * (tensor.dim() - 1)) for name, tensor in trainer.null.items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}],
)
def test_compiled_steps_are_the_eager_ones(graphs, changes):
    eager = make(**changes)
    compiled = make(compile=True, **changes)
    for step in range(2):
        expected, losses = eager.step(step), compiled.step(step)
        for name in expected:
            torch.testing.assert_close(losses[name], expected[name], rtol=1e-3, atol=1e-6)


def test_pixart_resumes_the_same_bits_with_sample_grids(graphs, tmp_path, monkeypatch):
    graphs = CompileCounterWithBackend("eager")  # traced, and no more
    monkeypatch.setattr(regions, "BACKEND", graphs)
    tiny_pixart().save_pretrained(tmp_path / "teacher")
    options = config(tmp_path / "teacher", tmp_path, "whole").replace(
        compile=True,
        fake_updates=1,
        max_train_steps=2,
        lr_decay_fraction=0.0,
        alpha_T_squared=0.0047,
        checkpointing_steps=1,
        validation_steps=1,
        validation_seeds=(1, 2),
        validation_prompts=PROMPTS[:1],
    )
    whole = distill(options)
    half = distill(options.replace(output_dir=str(tmp_path / "half"), max_train_steps=1))
    made = graphs.frame_count
    distill(DistillConfig.of(resume_from_checkpoint=str(half), max_train_steps=2))
    assert graphs.frame_count == made
    first, second = (load_tensors(r / "checkpoints/step-000002/student.safetensors") for r in (whole, half))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_own_modules_and_names_stay(graphs):
    pipeline = one_level_pipeline()
    plain, compiled = make(), make(pipeline=pipeline, compile=True)
    assert not any("forward" in vars(module) for module in pipeline.unet.modules())
    assert {p.data_ptr() for p in compiled.teacher.parameters()} == {
        p.data_ptr() for p in pipeline.unet.parameters()
    }
    for role in ("teacher", "student", "fake"):
        assert getattr(plain, role).state_dict().keys() == getattr(compiled, role).state_dict().keys()


def small_block():
    """A transformer block with LoRaD on some layers, no two sizes of weights and activations alike."""
    torch.manual_seed(0)
    block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=48).requires_grad_(False)
    config = LoRaDConfig(r=2, init_weights=False, target_modules=["to_q", "to_v", "net.2"])
    network = inject_adapter_in_model(config, torch.nn.Sequential(block))
    parameters = [p for p in network.parameters() if p.requires_grad]
    block = SimpleNamespace(network=network, parameters=parameters)
    block.inputs = [torch.randn(1, 7, 32), torch.randn(1, 5, 48)]
    block.call = lambda: network[0](block.inputs[0], encoder_hidden_states=block.inputs[1])
    return block


def saved_and_gradients(block):
    """Elements of what autograd keeps beside parameters, largest first, and the gradients."""
    own, kept = {p.data_ptr() for p in block.network.parameters()}, []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block.call()
    return sorted(kept, reverse=True), torch.autograd.grad(output.square().sum(), block.parameters)


def test_nothing_of_a_weights_size_is_kept_for_backward(graphs):
    """Angles of the smallest weight have 32 x 16 entries, the largest activation but one 7 x 256.

    With common subexpressions merged, the compiler keeps angles: the check can tell.
    """
    block = small_block()
    kept, expected = saved_and_gradients(block)
    regions.compile_regions(block.network, REGIONS)
    with regions.compiling():
        ours, gradients = saved_and_gradients(block)
    for gradient, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    assert sum(ours) <= sum(kept)
    torch._dynamo.reset()
    assert sum(saved_and_gradients(block)[0]) > sum(kept)


def test_bfloat16_is_within_its_rounding(graphs):
    """Compiled, a block departs from the eager one by less than bfloat16 does from float32."""
    full, eager, compiled = (small_block() for _ in range(3))
    for block in (eager, compiled):
        for p in block.network.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
        block.inputs = [tensor.bfloat16() for tensor in block.inputs]
    regions.compile_regions(compiled.network, REGIONS)
    with regions.compiling():
        found = compiled.call().float()
    rounding = (eager.call().float() - full.call()).norm()
    assert 0 < rounding < 0.05 * full.call().norm()
    assert (found - eager.call().float()).norm() <= rounding


def test_no_compiler_is_one_line(monkeypatch):
    def broken(module, inputs):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(regions, "BACKEND", broken)
    with pytest.raises(WadiError, match=r"--compile: .*omit the option") as caught:
        regions.check_compiler(torch.device("cpu"))
    assert "\n" not in str(caught.value)
