"""Options of the objective that the paper does not have: each against its equation written out again."""

import pytest
import torch

from tests.distill.test_processes import config as launched
from tests.distill.test_processes import two
from tests.distill.test_resume import config as resumable
from tests.distill.test_trainer import assert_losses_close, make, plain_epsilon, same, snapshot
from tests.files import metrics
from tests.tiny import tiny_pixart
from wadi.distill import DistillConfig, distill, train
from wadi.errors import WadiError
from wadi.files import load_tensors

DENOISING = {"denoising_weight": 0.6, "denoising_max_timestep": 0.3}
EVERYTHING = DENOISING | {
    "guidance_scale": 3.0,
    "guidance_max_timestep": 0.6,
    "guidance_scale_above": 2.0,
    "weighting": "normalized",
}
LOSSES = {
    "student_loss",
    "fake_loss",
    "denoising_loss",
}


def student_gradients(trainer, inputs):
    """Gradients of one update of the student, before clipping, and its losses."""
    gradients, hooks = {}, []
    for name, p in trainer.student_parameters.items():
        hooks.append(p.register_hook(lambda g, name=name: gradients.__setitem__(name, g.clone())))
    _, losses = trainer.update_student(inputs)
    for hook in hooks:
        hook.remove()
    return gradients, {name: float(value) for name, value in losses.items()}


def twin(trainer, **changes):
    """Another trainer with the same weights, average and moments of student and fake model."""
    other = make(trainer.schedule.prediction_type, **changes)
    for name, tensors in other.checkpoint_tensors().items():
        for key, tensor in tensors.items():
            tensor.copy_(trainer.checkpoint_tensors()[name][key])
    return other


def plain_student(trainer, z, condition):
    """The student's pictures in float64."""
    levels = trainer.backbone.pipeline.scheduler.alphas_cumprod.double()
    eps = plain_epsilon(trainer, trainer.student, z, torch.full((len(z),), 999), condition)
    return (z - (1 - levels[-1]).sqrt() * eps) / levels[-1].sqrt()


def assert_same_gradients(found, expected):
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=2e-3, atol=1e-6 + 1e-3 * float(want.abs().max()))


def test_guidance_of_an_interval_is_each_timesteps_own():
    """A batch on both sides of the limit: the teacher's x0 is that of the one or of the other guidance."""
    interval = {"guidance_scale": 3.0, "guidance_max_timestep": 0.4, "guidance_scale_above": 2.0}
    trainer = make(**interval, max_train_steps=2, train_batch_size=4)
    inputs = trainer.draw(0)
    t = torch.tensor([100, 400, 401, 900])
    where = inputs.z, {"t": t, "noise": inputs.place["noise"]}, inputs.condition
    found = trainer.scores.at(*where).x0_teacher
    for scale, own in ((3.0, slice(0, 2)), (2.0, slice(2, 4))):
        plain = twin(trainer, guidance_scale=scale, max_train_steps=2, train_batch_size=4)
        expected = plain.scores.at(*where).x0_teacher
        torch.testing.assert_close(found[own], expected[own])
        assert float((found - expected).abs().max()) > 1e-4  # the others have the other guidance


def test_guidance_of_an_interval_that_is_everything_changes_no_bit():
    trainer = make(guidance_scale=3.0, max_train_steps=2)
    whole = {"guidance_max_timestep": 0.9999, "guidance_scale_above": 7.0}
    other = twin(trainer, guidance_scale=3.0, max_train_steps=2, **whole)
    for step in range(2):
        trainer.step(step), other.step(step)
    assert same(snapshot(trainer), snapshot(other))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoising_gradient_is_the_equation(prediction_type):
    """What the term adds: x0 - x0_teacher of the unguided teacher, less the mean of each square of 4 x 4."""
    trainer = make(prediction_type, guidance_scale=2.0, **DENOISING)
    trainer.step(0)
    other, inputs = twin(trainer, guidance_scale=2.0), trainer.draw(1)
    t, noise = inputs.terms[1].values()
    level = trainer.backbone.pipeline.scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    x0 = plain_student(trainer, inputs.z, inputs.condition)
    x_t = (level.sqrt() * x0 + (1 - level).sqrt() * noise).detach()
    eps = plain_epsilon(trainer, trainer.teacher, x_t, t, inputs.condition)
    direction = (x0 - (x_t - (1 - level).sqrt() * eps) / level.sqrt()).detach()
    for top in (0, 4):
        for left in (0, 4):
            square = direction[..., top : top + 4, left : left + 4]
            square -= square.mean((-2, -1), keepdim=True)
    parameters = trainer.student_parameters
    loss = 0.6 * (x0 * direction).sum() / x0.numel()
    expected = torch.autograd.grad(loss, list(parameters.values()))
    total, losses = student_gradients(trainer, inputs)
    plain, _ = student_gradients(other, other.draw(1))
    assert losses["denoising_loss"] == pytest.approx(0.5 * direction.square().mean().item(), rel=1e-3)
    assert_same_gradients(
        {name: total[name] - plain[name] for name in total}, dict(zip(parameters, expected, strict=True))
    )


def test_denoising_has_timesteps_of_its_own():
    trainer = make(train_batch_size=512, min_timestep=0.05, max_timestep=0.98, **DENOISING)
    t = trainer.draw(0).terms[1]["t"]
    assert 50 <= int(t.min()) < 60
    assert 290 < int(t.max()) <= 300


def test_a_denoising_term_without_weight_changes_no_bit():
    plain = make()
    other = twin(plain, **DENOISING | {"denoising_weight": 0.0})
    for step in range(2):
        plain.step(step), other.step(step)
    assert same(snapshot(plain), snapshot(other))


def test_the_normalized_gradient_is_the_equation():
    trainer = make(weighting="normalized", guidance_scale=1.0, fake_guidance_scale=1.0)
    trainer.step(0)
    inputs, parameters = trainer.draw(1), trainer.student_parameters
    t, noise = inputs.place.values()
    level = trainer.backbone.pipeline.scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    x0 = plain_student(trainer, inputs.z, inputs.condition)
    x_t = (level.sqrt() * x0 + (1 - level).sqrt() * noise).detach()
    networks = trainer.teacher, trainer.fake
    teacher, fake = (plain_epsilon(trainer, each, x_t, t, inputs.condition) for each in networks)
    size = (teacher - noise).abs().mean((1, 2, 3), keepdim=True)
    loss = (x0 * ((teacher - fake) / size).detach()).sum() / x0.numel()
    expected = torch.autograd.grad(loss, list(parameters.values()))
    found, _ = student_gradients(trainer, inputs)
    assert_same_gradients(found, dict(zip(parameters, expected, strict=True)))


def test_loss_scale_divides_out_with_every_option():
    """Exactly, as it is a power of two."""
    scaled, plain = everything(gradient_accumulation_steps=2), everything(gradient_accumulation_steps=2)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for trainer in (scaled, plain):
        trainer.step(0)
    assert same(snapshot(scaled), snapshot(plain))


def test_transformer_trains_with_every_option(tmp_path):
    tiny_pixart().save_pretrained(tmp_path / "teacher")
    options = resumable(tmp_path / "teacher", tmp_path, "run", **EVERYTHING).replace(
        alpha_T_squared=0.0047,
        max_train_steps=4,
    )
    run = distill(options)
    last = run / "checkpoints/step-000004"
    names = sorted(path.name for path in last.glob("*.safetensors"))
    first = {name: load_tensors(last / name) for name in names}
    distill(DistillConfig.of(resume_from_checkpoint=str(run / "checkpoints/step-000002")))
    for name in names:
        assert same(first[name], load_tensors(last / name))
    rows = metrics(run)
    assert len(rows) == 4
    assert all(row["skipped_steps"] == 0 and row.keys() >= LOSSES for row in rows)


def everything(**changes):
    return make(**EVERYTHING | changes)


def test_resumed_with_every_option_goes_on_the_same(tmp_path):
    trainer = everything(output_dir=str(tmp_path), checkpointing_steps=2)
    train(trainer)
    again = everything(output_dir=str(tmp_path))
    again.load_checkpoint(tmp_path / "checkpoints/step-000002")
    assert not same(snapshot(trainer), snapshot(again))
    for step in (2, 3):
        again.step(step)
    assert same(snapshot(trainer), snapshot(again))


def test_accumulation_equals_the_larger_batch_with_every_option():
    large, small = everything(train_batch_size=4), everything(gradient_accumulation_steps=2)
    losses, others = large.step(0), small.step(0)
    for name in losses:
        torch.testing.assert_close(losses[name], others[name], rtol=2e-3, atol=1e-7)
    first, second = snapshot(large), snapshot(small)
    for name in first:
        if "exp_avg" in name:
            scale = float(first[name].abs().max())
            torch.testing.assert_close(first[name], second[name], rtol=2e-3, atol=2e-3 * scale + 1e-10)


def test_metrics_have_every_term(tmp_path):
    train(everything(output_dir=str(tmp_path)))
    row = metrics(tmp_path)[-1]
    assert {name for name in row if name.endswith("_loss")} == LOSSES


def test_two_processes_are_one_with_every_option(teacher_folder, tmp_path):
    """The gradients are averaged over both."""
    changes = EVERYTHING | {"max_train_steps": 3, "validation_steps": 0}
    changes["fake_layers"] = "student"
    (tmp_path / "one").mkdir()
    one = distill(launched(teacher_folder, tmp_path / "one", **changes))
    options = launched(teacher_folder, tmp_path, train_batch_size=1, gradient_accumulation_steps=2, **changes)
    codes, err = two(options, tmp_path)
    assert codes == [0, 0], err
    for name in ("student_optimizer", "fake_optimizer"):
        first, second = (
            load_tensors(run / f"checkpoints/step-000001/{name}.safetensors")
            for run in (one, tmp_path / "run")
        )
        for key in first:
            scale = float(first[key].abs().max())
            torch.testing.assert_close(first[key], second[key], rtol=3e-3, atol=3e-3 * scale + 1e-10)
    rows = [metrics(run) for run in (one, tmp_path / "run")]
    for ours, theirs in zip(*rows, strict=True):
        for name in LOSSES:
            assert theirs[name] == pytest.approx(ours[name], rel=2e-2, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale_above": -1.0}, "--guidance-scale-above: must be at least 0"),
        (
            {"guidance_scale_above": 2.0},
            "--guidance-scale-above: nothing is above; set --guidance-max-timestep",
        ),
        ({"guidance_max_timestep": 0.01}, "--min-timestep: must not exceed --guidance-max-timestep"),
        ({"guidance_max_timestep": 1.5}, "--guidance-max-timestep: must be at least 0 and at most 1"),
        ({"denoising_weight": -1.0}, "--denoising-weight: must be at least 0"),
        ({"denoising_weight": float("nan")}, "--denoising-weight: must be at least 0"),
        ({"denoising_max_timestep": 1.5}, "--denoising-max-timestep: must be at least 0 and at most 1"),
        (
            {"denoising_weight": 1.0, "min_timestep": 0.2},
            "--min-timestep: must not exceed --denoising-max-timestep",
        ),
    ],
)
def test_bad_values_get_one_line(options, message):
    with pytest.raises(WadiError, match=message) as error:
        DistillConfig.of(**options)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_replays_every_option(changes, compiled, monkeypatch):
    """Compiled: the first iteration alone, from equal weights.

    Later ones differ in the signs of gradients that are nearly zero, which Adam makes whole steps of. TF32,
    coarser than all that is compared, is off.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    changes = changes | {"max_train_steps": 6}
    eager, graphed = everything(**changes), everything(cuda_graphs=True, compile=compiled, **changes)
    for step in range(1 if compiled else 6):
        expected, losses = eager.step(step), graphed.step(step)
        eager.synchronize(), graphed.synchronize()
        assert_losses_close(losses, expected, step)
