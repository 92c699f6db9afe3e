"""`wadi distill` and `wadi report`: the options, and what a run leaves."""

import re
from typing import Literal, get_origin

import pytest

from tests.test_cli import run
from wadi import emoji
from wadi.commands.distill import parse, start_of
from wadi.distill.config import DistillConfig
from wadi.distill.presets import PRESETS

OPTIONS = DistillConfig.places()
GROUPS = ("model", "student", "fake model", "objective", "optimizer", "run")


def flag(name):
    return f"--{name.replace('_', '-')}"


def test_a_preset_sets_the_defaults_of_the_others():
    options, plan = parse(["--preset", "emoji", "--seed", "3"])
    assert not plan
    assert options == PRESETS["emoji"].replace(
        seed=3,
        pretrained_model_name_or_path=str(emoji.teacher_folder()),
        prompts=str(emoji.prompts_file()),
    )
    assert parse([]) == (DistillConfig(), False)
    assert parse(["--preset=sd15", "--plan"]) == (PRESETS["sd15"], True)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_itself_but_for_what_comes_with_wadi(preset):
    built_in = {"pretrained_model_name_or_path", "prompts"}
    start, own = start_of(["--preset", preset]), PRESETS[preset]
    values = own.values()
    changed = {name for name, value in start.values().items() if value != values[name]}
    assert changed <= (built_in if preset.startswith("emoji") else set())


def test_every_option_has_a_flag_that_sets_it():
    """A flag is the name of its option, whatever group the help shows it in."""
    given = {bool: [], int: ["7"], float: ["0.5"]}
    defaults = DistillConfig().values()
    free = [name for name, place in OPTIONS.items() if get_origin(place.hint) is not Literal]
    named = [name for name in free if type(defaults[name]) in given]
    assert len(named) > 30
    words = [[flag(name), *given[type(defaults[name])]] for name in named]
    options, _ = parse([word for pair in words for word in pair])
    values = options.values()
    assert {values[name] for name in named} == {True, 7, 0.5}
    assert parse(["--teacher", "t", "--out", "o"]) == parse(
        ["--pretrained-model-name-or-path", "t", "--output-dir", "o"]
    )


@pytest.mark.parametrize(("asked", "all_of_them"), [("--help", False), ("-h", False), ("--help-all", True)])
def test_help_shows_what_people_set_and_help_all_the_rest(asked, all_of_them, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("distill", "--preset", "emoji-cpu", asked) == 0
    shown = capsys.readouterr().out
    flags = set(re.findall(r"--[\w-]+", shown))
    often = {name for name, place in OPTIONS.items() if place.field.metadata["often"]}
    expected = {flag(name) for name in (OPTIONS if all_of_them else often)}
    assert {flag(name) for name in OPTIONS} & flags == expected
    assert "--help-all" in flags or all_of_them
    assert 18 <= len(often) <= 24
    assert all(f" {group} options " in shown for group in GROUPS)
    assert f"(default: {PRESETS['emoji-cpu'].run.max_train_steps})" in shown


def test_distill_leaves_a_student_and_a_report(student, capsys):
    assert "1 step" in (student / "report.html").read_text()
    assert run("report", student, "--steps", 2) == 0
    assert capsys.readouterr().out == f"report: {student / 'report.html'}\n"
    assert "<b>2 → 1</b>" in (student / "report.html").read_text()
