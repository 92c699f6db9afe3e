"""docs/uses.md and its pages say what the files of the uses say."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from wadi.errors import WadiError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "uses.py"

ROW = {"use": "edges", "measure": "F1 (up)", "teacher": 0.93, "student": 1, "time_ratio": 24.26}
CONTROL = {
    "header": "5 scenes",
    "rows": [
        {
            "name": name,
            "steps": steps,
            "scale": scale,
            "edge_f1": 0.9358,
            "objects": 0.83,
            "background": 1.0,
            "place_error": 1.66,
            "size_error": 0.75,
            "seconds": seconds,
        }
        for name, steps, scale, seconds in (
            ("teacher, scale 1", 25, 1.0, 1.5),
            ("student, scale 0.5", 1, 0.5, 0.075),
            ("autoencoder", None, None, None),
        )
    ],
    "pairs": [
        {"controlnets": count, "edge_f1": 0.8, "objects": 0.7, "place_error": 1.2, "size_error": 1.9}
        for count in (1, 2)
    ],
}


@pytest.fixture(scope="module")
def uses():
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("uses")
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def pages(uses, tmp_path):
    """A folder with pages that have the place of every table, and no results."""
    for name, page in {
        "uses": "uses.md",
        "sheets": "uses.md",
        **{n: t.page for n, t in uses.TABLES.items()},
    }.items():
        path = tmp_path / page
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(f"By hand.\n\n<!-- table: {name} -->\nold {name}\n<!-- /table -->\n")
    (tmp_path / "results").mkdir()
    return tmp_path


def write(folder, **results):
    for name, found in results.items():
        (folder / "results" / f"{name.replace('_', '-')}.json").write_text(json.dumps(found))


def test_rows_of_all_uses(uses, pages, capsys):
    write(
        pages,
        control=CONTROL | {"summary": [ROW, ROW | {"teacher": None, "student": 1.333, "time_ratio": None}]},
    )
    assert uses.main(uses.Options(folder=pages)) == 0
    lines = (pages / "uses.md").read_text().splitlines()
    assert lines[5:7] == [
        "| [edges](uses/control.md) | F1 (up) | 0.930 | 1.000 | - | 1/24.3 |",
        "| [edges](uses/control.md) | F1 (up) | - | 1.33 | - | - |",
    ]
    error = capsys.readouterr().err
    page = (pages / "uses" / "control.md").read_text()
    assert "| student | 1 | 0.5 | 0.936 | 0.830 | 1.000 | 1.7 | 0.8 | 0.075 s (1/20.0) |" in page
    assert "| the scenes through the autoencoder |  |  | 0.936 |" in page
    assert "5 scenes.\n" in page
    assert "inversion.json: is not there yet" in error
    assert "control.json" not in error


def test_every_use_of_a_sheet_is_one_of_the_table(uses):
    found = [json.loads((ROOT / f"docs/results/{name}.json").read_text()) for name in uses.USES]
    named = {row["use"] for each in found for row in each["summary"]}
    assert set(uses.SHEETS) <= named
    assert set(uses.SHEETS.values()) <= set(json.loads((ROOT / "docs/results/sheets.json").read_text()))


def test_check(uses, pages, capsys):
    write(pages, control=CONTROL | {"summary": [ROW]})
    assert uses.main(uses.Options(folder=pages, check=True)) == 1
    assert "uses.md (uses)" in capsys.readouterr().err
    assert "old uses" in (pages / "uses.md").read_text()
    uses.main(uses.Options(folder=pages))
    assert uses.main(uses.Options(folder=pages, check=True)) == 0


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({key: ROW[key] for key in ROW if key != "measure"}, "summary[0].measure is missing"),
        (ROW | {"teacher": "0.9"}, "summary[0].teacher must not be '0.9'"),
        (ROW | {"use": None}, "summary[0].use must not be None"),
    ],
)
def test_bad_summaries(uses, pages, row, told):
    write(pages, control=CONTROL | {"summary": [row]})
    with pytest.raises(WadiError) as error:
        uses.main(uses.Options(folder=pages))
    assert told in str(error.value)
    assert "control.json" in str(error.value)
    assert "old uses" in (pages / "uses.md").read_text()


def test_the_pages_say_what_the_files_say(uses, capsys):
    assert uses.main(uses.Options(folder=ROOT / "docs", check=True)) == 0, capsys.readouterr().err
