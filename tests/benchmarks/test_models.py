"""The benchmark of whole runs: a run is killed where it should be, and its figures are read."""

import json

import models


def test_a_run_is_killed_and_measured(tmp_path, monkeypatch):
    for name, value in (("STEPS", 4), ("EVERY", 2), ("KILL_AFTER", 2), ("LOGGED", 1)):
        monkeypatch.setattr(models, name, value)
    out = tmp_path / "rows.jsonl"
    models.main(models.Options(("tiny",), ("int8",), usual=False, whole=False, work=tmp_path, out=out))
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["model"], row["base"], row["killed"]) == ("tiny", "int8", True)
    assert row["seconds_a_step"] > 0
    assert "failed" not in row
    assert not (tmp_path / "run-tiny-int8").exists()


def test_a_run_that_fails_says_why(tmp_path):
    out = tmp_path / "rows.jsonl"
    options = models.Options(("tiny",), ("int8",), usual=False, whole=False, work=tmp_path, out=out)
    options.more = ("--student-rank=0",)
    models.main(options)
    assert "--student-rank" in json.loads(out.read_text())["failed"]
