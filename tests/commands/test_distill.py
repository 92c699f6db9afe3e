"""`wadi distill` and `wadi report`: the options, and what a run leaves."""

import dataclasses
import re

import pytest

from tests.test_cli import run
from wadi import emoji
from wadi.commands.distill import parse, start_of
from wadi.distill.config import GROUPS, PRESETS, DistillConfig

OPTIONS = dataclasses.fields(DistillConfig)


def flag(name):
    return f"--{name.replace('_', '-')}"


def test_a_preset_sets_the_defaults_of_the_others():
    options = parse(["--preset", "emoji", "--seed", "3"])
    assert options == dataclasses.replace(
        PRESETS["emoji"],
        seed=3,
        pretrained_model_name_or_path=str(emoji.teacher_folder()),
        prompts=str(emoji.prompts_file()),
    )
    assert parse([]) == DistillConfig()
    assert parse(["--preset=sd15"]) == PRESETS["sd15"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_itself_but_for_what_comes_with_wadi(preset):
    built_in = {"pretrained_model_name_or_path", "prompts"}
    start, own = start_of(["--preset", preset]), PRESETS[preset]
    changed = {option.name for option in OPTIONS if getattr(start, option.name) != getattr(own, option.name)}
    assert changed <= (built_in if preset.startswith("emoji") else set())


def test_every_option_has_a_flag_that_sets_it():
    """A flag is the name of its option, whatever group the help shows it in."""
    given = {bool: [], int: ["7"], float: ["0.5"]}
    named = [option for option in OPTIONS if type(option.default) in given]
    assert len(named) > 30
    words = [[flag(option.name), *given[type(option.default)]] for option in named]
    options = parse([word for pair in words for word in pair])
    assert {getattr(options, option.name) for option in named} == {True, 7, 0.5}
    assert parse(["--teacher", "t", "--out", "o"]) == parse(
        ["--pretrained-model-name-or-path", "t", "--output-dir", "o"]
    )


@pytest.mark.parametrize(("asked", "all_of_them"), [("--help", False), ("-h", False), ("--help-all", True)])
def test_help_shows_what_people_set_and_help_all_the_rest(asked, all_of_them, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("distill", "--preset", "emoji-cpu", asked) == 0
    shown = capsys.readouterr().out
    flags = set(re.findall(r"--[\w-]+", shown))
    expected = {flag(option.name) for option in OPTIONS if all_of_them or option.metadata["often"]}
    assert {flag(option.name) for option in OPTIONS} & flags == expected
    assert "--help-all" in flags or all_of_them
    assert 18 <= sum(option.metadata["often"] for option in OPTIONS) <= 24
    assert all(f" {group} options " in shown for group in GROUPS)
    assert f"(default: {PRESETS['emoji-cpu'].max_train_steps})" in shown


def test_distill_leaves_a_student_and_a_report(student, capsys):
    assert "1 step" in (student / "report.html").read_text()
    assert run("report", student, "--steps", 2) == 0
    assert capsys.readouterr().out == f"report: {student / 'report.html'}\n"
    assert "<b>2 → 1</b>" in (student / "report.html").read_text()
