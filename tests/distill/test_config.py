"""Options: round trip through YAML, every number checked, presets that hold the paper's values."""

import pytest

from wadi.distill.config import DistillConfig
from wadi.distill.presets import PRESETS
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


@pytest.mark.parametrize("name", ["sd15-paper", "sd21-base-paper", "sd21-paper"])
def test_stable_diffusion_presets_hold_the_papers_values(name):
    config = PRESETS[name]
    assert (config.student.rank, config.fake.rank) == (256, 32)
    assert (config.optimizer.student_learning_rate, config.optimizer.fake_learning_rate) == (1e-4, 1e-2)
    assert (config.objective.guidance_scale, config.fake.guidance_scale) == (1.5, 1.5)
    assert (config.objective.min_timestep, config.objective.max_timestep) == (0.02, 0.98)
    assert config.fake.null_prompt_probability == 0.1
    assert (config.fake.updates, config.objective.weighting, config.fake.weighting) == (
        1,
        "sigma_squared",
        "alpha_squared",
    )
    assert config.fake.layers == "attention"


def test_emoji_paper_preset_keeps_the_papers_proportions():
    config = PRESETS["emoji-paper"]
    assert (config.student.rank, config.fake.rank, config.fake.updates) == (24, 4, 1)
    assert config.fake.layers == "attention"


@pytest.mark.parametrize("name", PRESETS)
def test_the_fake_model_is_guided_in_the_papers_presets_only(name):
    paper, config = name.endswith("-paper"), PRESETS[name]
    found = config.fake.guidance_scale, config.fake.null_prompt_probability
    assert found == ((1.5, 0.1) if paper else (1.0, 0.0))


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
