"""Trackers: refused in one line before anything starts, or started."""

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from wadi.cli import main
from wadi.distill import trackers
from wadi.distill.config import DistillConfig
from wadi.distill.trackers import check_tracker, start_trackers
from wadi.errors import WadiError

INSTALLED = {str(tracker) for tracker in get_available_trackers()}
MISSING = sorted(LOGGER_TYPE_TO_CLASS.keys() - INSTALLED)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, rf"--report-to {name}: is not installed; pip install {name}, or omit") for name in MISSING),
        ("tensorbord", r"--report-to tensorbord: no such tracker; did you mean tensorboard\?"),
        ("TensorBoard", r"did you mean tensorboard\?"),
        ("tensorboard,wandb", "no such tracker"),
        ("nobody", "no such tracker; use one of aim, .*wandb"),
        ("", "no such tracker"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(name, message):
    with pytest.raises(WadiError, match=message) as error:
        check_tracker(name)
    assert "\n" not in str(error.value)


def test_what_is_installed_passes():
    for name in (None, *INSTALLED, *(["all"] if INSTALLED else [])):
        check_tracker(name)


def test_all_of_none_is_refused(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(WadiError, match="--report-to all: none is installed"):
        check_tracker("all")


@pytest.mark.parametrize("name", [*MISSING[:1], "nobody"])
def test_the_command_refuses_before_it_reads_or_writes(name, tmp_path, capsys):
    """Neither teacher nor prompts are there: the tracker is what it says first."""
    out = tmp_path / "run"
    options = ["--teacher", "nowhere", "--prompts", "nowhere.txt", "--out", str(out), "--report-to", name]
    assert main(["distill", *options]) == 2
    assert capsys.readouterr().err.startswith(f"wadi: error: --report-to {name}: ")
    assert not out.exists()


def test_a_tracker_that_cannot_start_is_one_line(tmp_path):
    """TensorBoard's folder cannot be made where a file is."""
    (tmp_path / "run").write_text("a file")
    config = DistillConfig.of(output_dir=str(tmp_path / "run"), report_to="tensorboard")
    accelerator = Accelerator(log_with=config.run.report_to, project_dir=config.run.output_dir, cpu=True)
    start_trackers(accelerator, config.replace(report_to=None))  # none is asked for
    with pytest.raises(WadiError, match=r"--report-to tensorboard: could not start: .*run"):
        start_trackers(accelerator, config)
