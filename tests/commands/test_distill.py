"""`wadi distill` and `wadi report`: what a run leaves, and what it starts from."""

from tests.test_cli import run
from wadi import emoji
from wadi.commands.distill import options_of
from wadi.distill.config import PRESETS


def test_presets_set_the_defaults_that_help_shows():
    options = options_of(["--preset", "emoji"])
    assert options.student_rank == PRESETS["emoji"].student_rank
    assert options.pretrained_model_name_or_path == str(emoji.teacher_folder())
    assert options_of(["--seed", "1"]).pretrained_model_name_or_path is None


def test_distill_leaves_a_student_and_a_report(student, capsys):
    assert "1 step" in (student / "report.html").read_text()
    assert run("report", student, "--steps", 2) == 0
    assert capsys.readouterr().out == f"report: {student / 'report.html'}\n"
    assert "2 steps became one" in (student / "report.html").read_text()
