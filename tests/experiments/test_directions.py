"""The experiment on the comparison runs, and removes its files."""

import subprocess
import sys
from pathlib import Path

import pytest

from wadi.files import read_json

SCRIPT = Path(__file__).parents[2] / "experiments" / "directions.py"


@pytest.mark.parametrize("student", ["full", "lorad"])
def test_both_commands_are_measured(student, tmp_path):
    options = ["--model", "tiny", "--student", student, "--swap", "--threads", "1"]
    folders = ["--folder", str(tmp_path / "work"), "--out", str(tmp_path / "figures.json")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, *folders], capture_output=True, text=True, check=True
    )
    figures = read_json(tmp_path / "figures.json")["figures"]
    assert list(figures) == ["directions", "directions swap"]
    for name, values in figures.items():
        assert name in done.stdout
        assert values["seconds"] > 0
        assert 0.1 < values["peak_gib"] < 3
    assert not list((tmp_path / "work").iterdir())
