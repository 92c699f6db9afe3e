"""One iteration against the same iteration written out plainly, and the laws of the loop."""

import dataclasses
import gc
import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from tests.tiny import PROMPTS, one_level_pipeline
from wadi.backbones import UNetBackbone
from wadi.backbones.condition import repeat
from wadi.distill import DistillConfig, Trainer, make_accelerator, train
from wadi.errors import WadiError
from wadi.lorad import LoRaDLayer
from wadi.prompts import encode_prompts

CONFIG = DistillConfig.of(
    train_batch_size=2,
    student_rank=2,
    fake_rank=2,
    fake_layers="student",
    fake_updates=2,
    student_learning_rate=1e-2,
    fake_learning_rate=1e-2,
    max_train_steps=4,
    logging_steps=2,
    checkpointing_steps=100,
    validation_steps=0,
    validation_prompts=("a red cat", "the sun"),
    validation_seeds=(0, 1, 2),
    fake_guidance_scale=1.5,
    null_prompt_probability=0.1,
)


def make(prediction_type="epsilon", pipeline=None, **changes):
    config = CONFIG.replace(**changes)
    accelerator = make_accelerator(config)
    pipeline = pipeline or one_level_pipeline(prediction_type)
    torch.nn.Module.to(pipeline.unet, config.run.dtype)
    backbone = UNetBackbone(pipeline, accelerator.device)
    prompts = encode_prompts(backbone.text, PROMPTS, list(config.run.validation_prompts))
    return Trainer(config, backbone, prompts, accelerator)


def snapshot(trainer):
    return {
        f"{group}/{name}": tensor.clone()
        for group, tensors in trainer.checkpoint_tensors().items()
        for name, tensor in tensors.items()
    }


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def assert_close_by_group(first, second):
    """Within 3 % in each group of tensors: a GPU's sums differ in their last bits, which Adam magnifies."""
    for group, tensors in first.checkpoint_tensors().items():
        other = second.checkpoint_tensors()[group]
        assert all(torch.equal(tensors[name], other[name]) for name in tensors if name.endswith(".step"))
        a, b = (torch.cat([t[name].flatten() for name in tensors]) for t in (tensors, other))
        assert float((a - b).norm()) <= 0.03 * float(a.norm())


def assert_losses_close(found, expected, step):
    """Within 2 %; says all that are not."""
    pairs = {name: (found[name], value) for name, value in expected.items()}
    wrong = {
        name: (float(a), float(b))
        for name, (a, b) in pairs.items()
        if not torch.isclose(a, b, rtol=2e-2, atol=1e-5)
    }
    assert not wrong, f"step {step}, found and expected: {wrong}"


def plain_epsilon(trainer, network, x_t, t, condition):
    """The network's noise prediction, in float64, one sample at a time."""
    levels = trainer.backbone.pipeline.scheduler.alphas_cumprod.double()
    result = []
    for x, step, c in zip(x_t, t, condition["encoder_hidden_states"], strict=True):
        output = network(x[None].float(), step, encoder_hidden_states=c[None]).sample.double()[0]
        if trainer.schedule.prediction_type == "v_prediction":
            output = (1 - levels[step]).sqrt() * x + levels[step].sqrt() * output
        result.append(output)
    return torch.stack(result)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_student_gradient_is_the_equations(prediction_type):
    """dL/dparameters of the student's update against the paper's equations, unbatched guidance, float64."""
    trainer = make(prediction_type, guidance_scale=2.0, fake_guidance_scale=1.5, max_grad_norm=1e9)
    trainer.step(0)  # so that student, fake model and teacher differ
    inputs, gradients = trainer.draw(1), {}
    parameters = trainer.student_parameters
    null = repeat(trainer.null, 2)
    levels = trainer.backbone.pipeline.scheduler.alphas_cumprod.double()

    T = torch.full((2,), 999)
    eps = plain_epsilon(trainer, trainer.student, inputs.z, T, inputs.condition)
    x0 = (inputs.z - (1 - levels[-1]).sqrt() * eps) / levels[-1].sqrt()
    t = inputs.place["t"]
    alpha2 = levels[t].view(-1, 1, 1, 1)
    x_t = (alpha2.sqrt() * x0 + (1 - alpha2).sqrt() * inputs.place["noise"]).detach()
    guided = []
    for network, scale in ((trainer.teacher, 2.0), (trainer.fake, 1.5)):
        p_null, p_cond = (plain_epsilon(trainer, network, x_t, t, c) for c in (null, inputs.condition))
        guided.append(p_null + scale * (p_cond - p_null))
    direction = ((1 - alpha2) * (guided[0] - guided[1])).detach()
    expected = torch.autograd.grad((x0 * direction).sum() / x0.numel(), list(parameters.values()))

    for name, p in parameters.items():
        p.register_hook(lambda g, name=name: gradients.__setitem__(name, g.clone()))
    _, losses = trainer.update_student(inputs)
    for name, want in zip(parameters, expected, strict=True):
        torch.testing.assert_close(
            gradients[name], want, rtol=2e-3, atol=1e-6 + 1e-3 * float(want.abs().max())
        )
    value = 0.5 * direction.square().mean()
    torch.testing.assert_close(losses["student_loss"].double(), value.double(), rtol=1e-3, atol=1e-7)


def test_fake_loss_is_the_equation():
    trainer = make()
    trainer.step(0)
    inputs = trainer.draw(1)
    x0, (t, noise, _) = inputs.z, inputs.fake[0].values()
    alpha2 = trainer.backbone.pipeline.scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    x_t = alpha2.sqrt() * x0 + (1 - alpha2).sqrt() * noise
    with torch.no_grad():
        eps = plain_epsilon(trainer, trainer.fake, x_t, t, inputs.condition)
    expected = (alpha2 * (eps - noise) ** 2).mean()
    drawn = {"t": t, "noise": noise, "null": torch.tensor(False)}
    loss = trainer.update_fake(x0, inputs.condition, drawn)["fake_loss"]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


def test_guidance_of_one_skips_the_null_prompt():
    trainer, sizes = make(guidance_scale=1.0, fake_guidance_scale=1.0), []
    trainer.teacher.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    trainer.step(0)
    other = make(guidance_scale=1.0, fake_guidance_scale=1.5)
    other.teacher.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    other.fake.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    other.step(0)
    assert sizes == [2, 2, 4, 2, 2]


def test_randomness_is_of_seed_and_step():
    trainer = make()
    first, again = trainer.draw(3).tensors(), trainer.draw(3).tensors()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [trainer.draw(4), make(seed=1).draw(3)]
    assert not any(torch.equal(first[0], other.z) for other in others)


def test_processes_share_the_draw_of_the_larger_batch():
    """Two processes of batch 2, one after the other, are one process of batch 4."""
    changes = {"fake_updates": 3, "denoising_weight": 1.0}
    whole, part, shares = make(train_batch_size=4, **changes).draw(3), make(**changes), []
    for rank in range(2):
        part.accelerator = SimpleNamespace(process_index=rank, num_processes=2)
        shares.append(part.draw(3).tensors())
    for one, first, second in zip(whole.tensors(), *shares, strict=True):
        if one.dim():
            assert torch.equal(one, torch.cat([first, second]))
            assert not torch.equal(first, second)
        else:  # one flag for the whole batch
            assert one == first == second


def test_timesteps_stay_in_their_ranges():
    trainer = make(train_batch_size=512, min_timestep=0.02, max_timestep=0.98)
    inputs = trainer.draw(0)
    t, fake_t = inputs.place["t"], inputs.fake[0]["t"]
    assert 20 <= int(t.min()) < 60
    assert 940 < int(t.max()) <= 980
    assert 0 <= int(fake_t.min()) < 20
    assert 980 < int(fake_t.max()) <= 999


def test_null_prompt_probability():
    def flags(probability):
        trainer = make(fake_updates=300, train_batch_size=1, null_prompt_probability=probability)
        return sum(bool(drawn["null"]) for drawn in trainer.draw(0).fake)

    assert 10 < flags(0.1) < 60
    assert (flags(0.0), flags(1.0)) == (0, 300)


def test_null_prompt_reaches_the_whole_batch():
    trainer, seen = make(null_prompt_probability=1.0), []
    inner = trainer.backbone.predict

    def predict(network, x_t, t, condition, guidance):
        seen.append((network, condition))
        return inner(network, x_t, t, condition, guidance)

    trainer.backbone.predict = predict
    trainer.step(0)
    updates = [c for network, c in seen if network is trainer.fake][1:]  # the first call is the guided one
    assert len(updates) == 2
    null = trainer.null["encoder_hidden_states"]
    states = [torch.broadcast_to(c["encoder_hidden_states"], (2, *null.shape[1:])) for c in updates]
    assert all(torch.equal(c, null.expand_as(c)) for c in states)


def test_average_follows_its_recursion():
    trainer, decay = make(ema_decay=0.3), [min(0.3, (1 + n) / (10 + n)) for n in range(3)]
    expected = {name: p.detach().clone() for name, p in trainer.student_parameters.items()}
    for step in range(3):
        trainer.step(step)
        for name, p in trainer.student_parameters.items():
            expected[name] = decay[step] * expected[name] + (1 - decay[step]) * p.detach()
    for name, average in trainer.ema_state().items():
        torch.testing.assert_close(average, expected[name])


def test_average_is_lent_and_the_own_weights_come_back():
    trainer = make()
    trainer.step(0)
    before, average = snapshot(trainer), trainer.ema_state()
    with trainer.ema_weights():
        for name, p in trainer.student_parameters.items():
            assert torch.equal(p, average[name])
    assert same(before, snapshot(trainer))


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"mixed_precision": "bf16"}])
def test_variants_train_close_to_the_plain_step(changes):
    plain, other = make(), make(**changes)
    tolerance = 0.1 if "mixed_precision" in changes else 1e-4
    plain_losses, losses = plain.step(0), other.step(0)
    assert all(p.dtype == torch.float32 for p in other.student_parameters.values())
    for name in ("student_loss", "fake_loss"):
        assert losses[name].dtype == torch.float32
        assert float(losses[name]) == pytest.approx(float(plain_losses[name]), rel=tolerance, abs=1e-6)


def test_base_never_changes():
    trainer = make()
    before = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    for step in range(2):
        trainer.step(step)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.teacher.state_dict().items())


def test_two_trainers_share_a_backbone_and_do_not_disturb_each_other():
    pipeline = one_level_pipeline()
    alone = make()
    first, second = make(pipeline=pipeline), make(pipeline=pipeline, seed=7)
    for step in range(2):
        alone.step(step), first.step(step), second.step(step)
    assert same(snapshot(alone), snapshot(first))
    assert not same(snapshot(first), snapshot(second))


def test_train_writes_metrics_samples_and_checkpoints(tmp_path):
    trainer = make(output_dir=str(tmp_path), validation_steps=2, checkpointing_steps=3, logging_steps=2)
    assert train(trainer)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4]
    assert all(math.isfinite(row["student_loss"]) and row["student_learning_rate"] == 1e-2 for row in rows)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-000002.png", "step-000004.png"]
    assert Image.open(tmp_path / "samples/step-000004.png").size > (16 * 3, 16 * 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("role", ["student", "fake"])
def test_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path, role):
    trainer = make(output_dir=str(tmp_path), checkpointing_steps=1, max_skipped_steps=1)
    with torch.no_grad():
        next(iter(getattr(trainer, f"{role}_parameters").values())).fill_(math.nan)
    with pytest.raises(WadiError, match=r"step 1: \w+ is nan, 1 steps? in a row") as error:
        train(trainer)
    assert "\n" not in str(error.value)
    assert not list(Path(tmp_path).iterdir())


def spoil(trainer, steps, role="teacher"):
    """Let the network's predictions be infinite during the given steps."""
    inner_step, inner, now = trainer.step, trainer.backbone.predict, [0]

    def predict(network, x_t, t, condition, guidance):
        output = inner(network, x_t, t, condition, guidance)
        return output * math.inf if network is getattr(trainer, role) and now[0] in steps else output

    trainer.backbone.predict = predict
    trainer.step = lambda step: (now.__setitem__(0, step), inner_step(step))[1]


@pytest.mark.parametrize(
    ("role", "kept"), [("teacher", ("student", "ema")), ("fake", ("student", "fake", "ema"))]
)
def test_step_that_is_not_finite_changes_nothing_and_is_counted(role, kept):
    """No weight, average, moment or count of the spoilt role moves; what was finite goes on."""
    trainer = make(fake_updates=1)
    spoil(trainer, {1}, role)
    trainer.step(0)
    before = snapshot(trainer)
    trainer.step(1)
    after = snapshot(trainer)
    for name, tensor in before.items():
        frozen = name.split("/")[0].removesuffix("_optimizer") in kept
        assert torch.equal(tensor, after[name]) or not frozen, name
    assert same(before, after) == (role == "fake")
    assert trainer.skipped.tolist() == [1, 1]
    trainer.step(2)
    assert trainer.skipped.tolist() == [1, 0]
    assert not any(
        torch.equal(before[f"student/{name}"], p) for name, p in trainer.student_parameters.items()
    )


def test_run_with_skipped_steps_goes_on_and_says_so(tmp_path):
    trainer = make(output_dir=str(tmp_path), logging_steps=1, max_skipped_steps=2)
    spoil(trainer, {0, 2})
    assert train(trainer)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["skipped_steps"] for row in rows] == [1, 1, 2, 2]
    assert ["student_loss" in row for row in rows] == [False, True, False, True]
    again = make(output_dir=str(tmp_path))
    again.load_checkpoint(tmp_path / "checkpoints/step-000004")
    assert again.skipped.tolist() == [2, 0]


def test_run_of_skipped_steps_stops_though_it_was_over_before_the_log(tmp_path):
    trainer = make(output_dir=str(tmp_path), logging_steps=4, max_skipped_steps=2)
    spoil(trainer, {1, 2})
    with pytest.raises(WadiError, match="step 4: gradients were not finite, 2 steps in a row") as error:
        train(trainer)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints").exists()


def test_loss_scale_backs_off_after_a_real_overflow(tmp_path):
    """Guidance makes the student's scaled gradient overflow float32, and not the fake model's."""
    trainer = make(guidance_scale=1e6, output_dir=str(tmp_path))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = snapshot(trainer)
    losses = trainer.step(0)
    assert float(losses["student_loss"]) < math.inf == float(losses["student_grad_norm"].nan_to_num(math.inf))
    assert trainer.accelerator.scaler.get_scale() == 2.0**126
    assert trainer.skipped.tolist() == [1, 1]
    moved = {name.split("/")[0] for name, x in snapshot(trainer).items() if not torch.equal(x, before[name])}
    assert moved == {"fake", "fake_optimizer"}
    trainer.global_step = 1
    trainer.save_checkpoint()
    again = make(guidance_scale=1e6, output_dir=str(tmp_path))
    again.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    again.load_checkpoint(tmp_path / "checkpoints/step-000001")
    assert again.accelerator.scaler.get_scale() == 2.0**126


def test_cuda_graphs_without_cuda_are_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(WadiError, match="--cuda-graphs"):
        make(cuda_graphs=True)


@pytest.mark.parametrize(("fake_updates", "expected"), [(1, 5), (2, 7)])
def test_rotations_an_iteration(rotations, fake_updates, expected):
    """Each adapted layer turns five times: student forward and back, fake model guided, then both too."""
    trainer = make(fake_updates=fake_updates)
    layers = sum(isinstance(module, LoRaDLayer) for module in trainer.student.modules())
    rotations.clear()
    trainer.step(0)
    assert len(rotations) == expected * layers


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
    ],
)
def test_cuda_graph_replays_the_eager_iteration(changes):
    """Compiled iterations: tests/benchmarks/test_compiled.py compares their gradients."""
    changes = changes | {"lr_decay_fraction": 0.5, "max_train_steps": 6}
    eager, graphed = make(**changes), make(cuda_graphs=True, **changes)
    for step in range(6):
        expected, losses = eager.step(step), graphed.step(step)
        eager.synchronize(), graphed.synchronize()
        assert_losses_close(losses, expected, step)
    assert_close_by_group(eager, graphed)


@pytest.mark.gpu
def test_cuda_graph_skips_a_step_that_is_not_finite():
    trainer = make(cuda_graphs=True)
    trainer.step(0)
    trainer.synchronize()
    before, draw = snapshot(trainer), trainer.draw
    trainer.draw = lambda step: dataclasses.replace(draw(step), z=draw(step).z * math.inf)
    trainer.step(1)
    trainer.synchronize()
    assert same(before, snapshot(trainer))
    assert trainer.skipped.tolist() == [1, 1]
    trainer.draw = draw
    trainer.step(2)
    trainer.synchronize()
    assert not same(before, snapshot(trainer))
    assert trainer.skipped.tolist() == [1, 0]


@pytest.mark.gpu
def test_half_precision_trains_with_loss_scaling():
    AcceleratorState._reset_state()  # accelerate allows one precision a process
    trainer, before = make(mixed_precision="fp16"), None
    for step in range(8):
        before = before or snapshot(trainer)
        losses = trainer.step(step)
    trainer.synchronize()
    assert all(math.isfinite(value) for value in losses.values()) or int(trainer.skipped[1])
    assert int(trainer.skipped[0]) < 8
    assert not same(before, snapshot(trainer))
    AcceleratorState._reset_state()


@pytest.mark.gpu
def test_trainers_on_one_gpu_work_round_robin():
    alone, pipeline = make(cuda_graphs=True), one_level_pipeline()
    both = [make(pipeline=pipeline, cuda_graphs=True, seed=seed) for seed in (0, 7)]
    for step in range(4):
        alone.step(step)
        for trainer in both:
            trainer.step(step)
    for trainer in (alone, *both):
        trainer.synchronize()
    assert_close_by_group(alone, both[0])


def test_a_trainer_is_freed_as_soon_as_nobody_uses_it():
    """Without the collector of circles: several trainers in one process would keep each other's memory."""
    gc.disable()
    try:
        trainer = make()
        trainer.step(0)
        gone = weakref.ref(trainer)
        del trainer
        assert gone() is None
    finally:
        gc.enable()
