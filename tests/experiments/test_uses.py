"""docs/uses.md and its pages say what the result files of the uses say."""

import json
from pathlib import Path

import uses

ROOT = Path(__file__).parents[2]


def test_every_use_of_a_sheet_is_one_of_the_table():
    found = [json.loads((ROOT / f"docs/results/{name}.json").read_text()) for name in uses.USES]
    named = {row["use"] for each in found for row in each["summary"]}
    assert set(uses.SHEETS) <= named
    assert set(uses.SHEETS.values()) <= set(json.loads((ROOT / "docs/results/sheets.json").read_text()))


def test_the_pages_say_what_the_files_say(capsys):
    assert uses.main(uses.Options(folder=ROOT / "docs", check=True)) == 0, capsys.readouterr().err
