"""Students trained as one network against each trained by its own `Trainer`."""

import pytest
import stacked
import torch

from tests.distill.test_trainer import CONFIG, make
from tests.tiny import PROMPTS, one_level_pipeline, tiny_pixart
from wadi.backbones import PixArtBackbone
from wadi.distill import Trainer, make_accelerator
from wadi.distill.config import DistillConfig
from wadi.prompts import encode_prompts

# not 1 above: before the first update teacher and fake model are the same, and their difference is rounding
INTERVAL = {"guidance_scale": 1.5, "guidance_max_timestep": 0.5, "guidance_scale_above": 3.0}
STUDENTS = (
    {"student_method": "lora", "student_rank": 3, "guidance_scale": 2.0},
    {"student_rank": 2, "seed": 1, "student_learning_rate": 3e-2, **INTERVAL},
    {"student_rank": 3, "seed": 2, "fake_rank": 3},
    {"student_rank": 2, "seed": 3, "fake_method": "lora"},
    {"student_method": "lora", "student_rank": 4, "seed": 4},
)
# Adam divides by the size of a gradient: without a large epsilon it magnifies rounding where there is none
COMMON = {"adam_epsilon": 1e-2, "max_grad_norm": 0.05}


def trainers(changes, common):
    pipeline = one_level_pipeline()
    return [make(pipeline=pipeline, **(COMMON | common | each)) for each in changes]


def assert_alike(own, together, start):
    """What moved in each, from the same start, is the same but for 3e-3 of it, the rounding of moments."""
    for group, tensors in own.checkpoint_tensors().items():
        other, before = together.checkpoint_tensors()[group], start[group]
        names = [name for name in tensors if not name.endswith(".step")]
        a, b, c = (torch.cat([t[name].flatten() for name in names]) for t in (tensors, other, before))
        moved = float((a - c).norm())
        assert moved > 0
        assert float((a - b).norm()) <= 3e-3 * moved, group


@pytest.mark.parametrize(
    ("changes", "common"),
    [
        (STUDENTS, {"fake_guidance_scale": 1.2, "null_prompt_probability": 0.5}),
        (STUDENTS[:2], {"fake_guidance_scale": 1.0, "fake_layers": "attention", "max_timestep": 0.5}),
    ],
    ids=["guided-fake", "other-timesteps"],
)
def test_students_of_a_stack_are_those_of_their_trainers(changes, common):
    alone, members = trainers(changes, common), trainers(changes, common)
    start = [
        {g: {n: x.clone() for n, x in tensors.items()} for g, tensors in t.checkpoint_tensors().items()}
        for t in alone
    ]
    stack = stacked.Stack(members)
    for step in range(2):
        expected = [trainer.step(step) for trainer in alone]
        found = {id(trainer): losses for trainer, losses in stack.step(step)}
        for trainer, losses in zip(members, expected, strict=True):
            assert found[id(trainer)].keys() == losses.keys()
            for name, value in losses.items():
                torch.testing.assert_close(found[id(trainer)][name], value, rtol=2e-3, atol=1e-6)
    for own, together, before in zip(alone, members, start, strict=True):
        assert_alike(own, together, before)
        z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        condition = {name: x[:2] for name, x in own.prompts.embeddings.take(torch.arange(2)).items()}
        with torch.no_grad():
            torch.testing.assert_close(
                together.generate(z, condition), own.generate(z, condition), rtol=1e-2, atol=1e-2
            )


def test_transformers_are_stacked_too():
    backbone = PixArtBackbone(tiny_pixart())
    prompts = encode_prompts(backbone.text, PROMPTS, [])
    common = CONFIG.replace(**COMMON, fake_guidance_scale=1.0, alpha_T_squared=0.0047, validation_prompts=())

    def make_all():
        configs = [common.replace(**each) for each in STUDENTS[:2]]
        return [Trainer(config, backbone, prompts, make_accelerator(config)) for config in configs]

    alone, members = make_all(), make_all()
    stack = stacked.Stack(members)
    for step in range(2):
        expected = [trainer.step(step) for trainer in alone]
        found = {id(trainer): losses for trainer, losses in stack.step(step)}
    for trainer, losses in zip(members, expected, strict=True):
        for name, value in losses.items():
            torch.testing.assert_close(found[id(trainer)][name], value, rtol=2e-3, atol=1e-6)


def test_what_cannot_be_stacked():
    plain = DistillConfig()
    alike = [{}, {"student_method": "lora"}, {"guidance_scale": 3.0}, {"fake_rank": 8}, {"seed": 5}]
    assert len({stacked.stack_key(plain.replace(**each)) for each in alike}) == 1
    other = {"fake_updates": 2}, {"fake_guidance_scale": 1.5}, {"fake_layers": "student"}
    keys = {stacked.stack_key(plain.replace(**each)) for each in ({}, *other)}
    assert len(keys) == 1 + len(other)
    never = (
        {"student_method": "full"},
        {"fake_method": "full"},
        {"weighting": "normalized"},
        {"gradient_accumulation_steps": 2},
    )
    assert {stacked.stack_key(plain.replace(**each)) for each in never} == {None}
