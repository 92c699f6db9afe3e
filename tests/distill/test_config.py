"""Options: they come back from YAML, every number is checked, and presets go together."""

from dataclasses import dataclass

import pytest

from wadi.distill.config import DistillConfig
from wadi.distill.options import Options, option
from wadi.distill.presets import PRESETS
from wadi.distill.terms import TERMS
from wadi.distill.update import learning_rate_factor
from wadi.errors import WadiError


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(tmp_path, name):
    config = PRESETS[name].replace(
        validation_prompts=("ein Bär: 'groß'",),
        alpha_T_squared=0.0047,
        report_to="tensorboard",
    )
    config.save(tmp_path / "config.yaml")
    assert DistillConfig.load(tmp_path / "config.yaml") == config


def test_yaml_written_by_hand(tmp_path):
    path = tmp_path / "config.yaml"
    text = "optimizer: {student_learning_rate: 1e-3}\nobjective: {guidance_scale: 2}\n"
    path.write_text(text + "run:\n  validation_seeds: [1, 2]\n")
    config = DistillConfig.load(path)
    assert (config.optimizer.student_learning_rate, config.objective.guidance_scale) == (1e-3, 2.0)
    assert config.run.validation_seeds == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("studnet: {rank: 3}", "unknown option 'studnet'; did you mean student"),
        ("student: {rnak: 3}", "unknown option 'rnak'; did you mean rank"),
        ("student: 3", "student: is a group"),
        ("student: {rank: three}", "--student-rank"),
        ("run: {mixed_precision: fp8}", "--mixed-precision: must be one of no, fp16, bf16"),
        ("- 1", "name: value"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml_gives_one_line(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(WadiError, match=message) as error:
        DistillConfig.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train_batch_size", 0),
        ("max_train_steps", -1),
        ("student_rank", 0),
        ("fake_updates", 0),
        ("seed", -1),
        ("student_learning_rate", 0.0),
        ("fake_learning_rate", float("nan")),
        ("fake_learning_rate", float("inf")),
        ("guidance_scale", -1.0),
        ("min_timestep", 1.5),
        ("ema_decay", 1.0),
        ("null_prompt_probability", 2.0),
        ("alpha_T_squared", 0.0),
        ("weighting", "best"),
        ("validation_seeds", (-1,)),
        ("train_batch_size", 2.5),
        ("gradient_checkpointing", "yes"),
    ],
)
def test_bad_values_name_the_option(option, value):
    with pytest.raises(WadiError, match=f"--{option.replace('_', '-')}"):
        DistillConfig.of(**{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"min_timestep": 0.6, "max_timestep": 0.5},
        {"cuda_graphs": True, "mixed_precision": "fp16"},
        {"validation_seeds": ()},
    ],
)
def test_options_that_do_not_go_together(options):
    with pytest.raises(WadiError):
        DistillConfig.of(**options)


@pytest.mark.parametrize("name", [n for n in PRESETS if f"{n}-paper" in PRESETS and n != "emoji"])
def test_other_presets_have_a_fake_model_that_keeps_up(name):
    """The student's layers and rank, and several updates; all else is the paper's."""
    ours, paper = PRESETS[name], PRESETS[f"{name}-paper"]
    assert (ours.fake.layers, ours.fake.rank) == ("student", ours.student.rank)
    assert ours.fake.updates > 1
    fake = ("fake_rank", "fake_layers", "fake_updates", "fake_guidance_scale", "null_prompt_probability")
    own = {"preset": name, "output_dir": ours.run.output_dir}
    assert paper.replace(**own, **{name: ours.values()[name] for name in fake}) == ours


def test_fingerprint_follows_what_decides_the_numbers():
    config = DistillConfig()
    assert config.fingerprint() == config.replace(logging_steps=3, output_dir="x").fingerprint()
    assert config.fingerprint() != config.replace(fake_updates=2).fingerprint()


def test_learning_rate_schedule():
    config = DistillConfig.of(max_train_steps=100, lr_warmup_steps=10, lr_decay_fraction=0.4)
    factors = [learning_rate_factor(config, step) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert set(factors[10:60]) == {1.0}
    assert factors[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 100)])
    assert learning_rate_factor(DistillConfig(), 0) == learning_rate_factor(DistillConfig(), 19_999) == 1


def test_terms_and_their_options_have_the_same_names():
    groups = {place.path[1] for place in DistillConfig.places().values() if len(place.path) == 3}
    assert {term.name for term in TERMS} == groups


def test_two_options_cannot_have_one_flag():
    @dataclass(frozen=True)
    class Inner(Options):
        weight: float = option(0.0, "weight")

    @dataclass(frozen=True)
    class Outer(Options):
        weight: float = option(1.0)
        inner: Inner = Inner()

    Outer.__annotations__["inner"] = Inner  # its name is not one of the module
    with pytest.raises(TypeError, match="--weight is the flag of two options"):
        Outer.places()


def test_a_new_option_does_not_end_older_runs():
    """Options with their defaults do not count for the fingerprint."""
    config = DistillConfig.of(student_rank=8)
    assert config.replace(guidance_scale=DistillConfig().objective.guidance_scale).fingerprint() == (
        config.fingerprint()
    )
    assert config.replace(guidance_scale=3.0).fingerprint() != config.fingerprint()
