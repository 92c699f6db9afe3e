"""The experiment measures a command in a process of its own, and removes its files."""

import directions

from wadi.files import read_json


def test_a_command_is_measured(tmp_path, capfd):
    options = {"model": "tiny", "student": "lorad", "threads": 1}
    folders = {"folder": tmp_path / "work", "out": tmp_path / "figures.json"}
    directions.main(directions.Options(**options, **folders))
    figures, shown = read_json(tmp_path / "figures.json")["figures"], capfd.readouterr().out
    assert list(figures) == ["directions"]
    for name, values in figures.items():
        assert name in shown
        assert 0.1 < values["peak_gib"] < 3
    assert not list((tmp_path / "work").iterdir())
