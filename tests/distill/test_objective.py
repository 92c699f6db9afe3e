"""Options of the objective that the paper does not have: each against its equation written out again."""

import dataclasses

import pytest
import torch

from tests.distill.test_trainer import CONFIG, make, same, snapshot
from wadi.distill import DistillConfig
from wadi.distill.trainer import annealed
from wadi.errors import WadiError


def test_annealed_goes_linearly_and_stays():
    values = [annealed(4.0, 1.0, step, 7) for step in range(9)]
    assert values == pytest.approx([4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0])
    assert annealed(4.0, None, 3, 7) == 4.0
    assert annealed(4.0, 1.0, 0, 1) == 4.0


def test_annealed_guidance_is_the_fixed_one_of_each_step():
    """Every step of the annealed training is a step with that step's guidance, to the bit."""
    trainer, seen = make(guidance_scale=3.0, guidance_scale_end=1.5, max_train_steps=4), []
    for step in range(4):
        other = make(guidance_scale=3.0 - 0.5 * step)
        for name, tensors in trainer.checkpoint_tensors().items():
            for key, tensor in tensors.items():
                other.checkpoint_tensors()[name][key].copy_(tensor)
        trainer.step(step), other.step(step)
        assert same(snapshot(trainer), snapshot(other))
        seen.append(float(trainer.guidance_scale))
    assert seen == [3.0, 2.5, 2.0, 1.5]


@pytest.mark.parametrize(
    ("start", "end", "size"), [(1.0, 1.0, 2), (1.0, 2.0, 4), (2.0, 1.0, 4), (1.0, None, 2)]
)
def test_null_prompt_is_left_out_only_where_both_ends_are_one(start, end, size):
    trainer, sizes = make(guidance_scale=start, guidance_scale_end=end, max_train_steps=2), []
    trainer.teacher.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    trainer.step(0), trainer.step(1)
    assert sizes == [size, size]


def test_highest_timestep_goes_down():
    changes = {"train_batch_size": 512, "min_timestep": 0.3, "max_train_steps": 3}
    trainer = make(max_timestep=0.9, max_timestep_end=0.5, **changes)
    plain = make(max_timestep=0.9, **changes)
    for step, highest in enumerate((900, 700, 500)):
        inputs, others = trainer.draw(step), plain.draw(step)
        assert 300 <= int(inputs.t.min()) < 330
        assert highest - 30 < int(inputs.t.max()) <= highest
        assert torch.equal(inputs.z, others.z)
        assert torch.equal(inputs.t, others.t) == (step == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale_end": -1.0}, "--guidance-scale-end: must be zero or more"),
        ({"max_timestep_end": 1.5}, "--max-timestep-end: must be between 0 and 1"),
        (
            {"min_timestep": 0.5, "max_timestep_end": 0.4},
            "--min-timestep: must not exceed --max-timestep-end",
        ),
    ],
)
def test_bad_values_get_one_line(options, message):
    with pytest.raises(WadiError, match=message) as error:
        DistillConfig(**options)
    assert "\n" not in str(error.value)


def test_fingerprint_of_the_defaults_is_as_before_these_options():
    """So that checkpoints of before can be gone on with; set, they count."""
    assert DistillConfig().fingerprint() == "86b81627ee828bf7"
    for name, value in {"guidance_scale_end": 2.0, "max_timestep_end": 0.5}.items():
        assert dataclasses.replace(CONFIG, **{name: value}).fingerprint() != CONFIG.fingerprint()


@pytest.mark.gpu
def test_cuda_graph_follows_the_guidance():
    changes = {"guidance_scale": 4.0, "guidance_scale_end": 1.0, "max_train_steps": 6}
    eager, graphed = make(**changes), make(cuda_graphs=True, **changes)
    for step in range(6):
        expected, losses = eager.step(step), graphed.step(step)
        eager.synchronize(), graphed.synchronize()
        for name in expected:
            torch.testing.assert_close(losses[name], expected[name], rtol=2e-2, atol=1e-5)
