"""What was called right on a sheet belongs to the images that the sheet shows."""

from pathlib import Path

import pytest
import sheets
import torch
from PIL import Image

from wadi.files import read_json

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def one(monkeypatch, tmp_path):
    """Options, and a way to say what the only sheet shows."""
    shown = {}
    monkeypatch.setattr(sheets, "SHEETS", {"one": sheets.Sheet(lambda options: shown["made"], "a square")})

    def show(level, text="a square"):
        images = torch.full((24, 3, 8, 8), level / 255) * torch.linspace(0.5, 1, 24)[:, None, None, None]
        shown["made"] = ([text] * 24, images)

    show(200)
    return sheets.Options(folder=tmp_path, out=tmp_path / "sheets.json", device="cpu"), show


@pytest.mark.parametrize(
    ("level", "text", "kept"),
    [(200, "a square", True), (202, "a square", True), (150, "a square", False), (200, "a circle", False)],
)
def test_what_is_right_is_kept_for_the_same_images_and_prompts_only(one, capsys, level, text, kept):
    options, show = one
    sheets.main(options)
    assert "look at it" in capsys.readouterr().out
    found = read_json(options.out)
    found["one"]["right"] = [0, 5]
    sheets.write_json(options.out, found)
    show(level, text)
    sheets.main(options)
    assert read_json(options.out)["one"]["right"] == ([0, 5] if kept else None)
    assert ("look at it" in capsys.readouterr().out) == (not kept)


def test_the_committed_sheets_were_looked_at():
    found = read_json(DOCS / "results" / "sheets.json")
    assert list(found) == list(sheets.SHEETS)
    files = {path.name: path for path in (DOCS / "images" / "sheets").iterdir()}
    assert set(files) == {each["sheet"] for each in found.values()}
    for name, each in found.items():
        assert each["looked_for"] == sheets.SHEETS[name].looked_for
        assert len(each["prompts"]) == sheets.COUNT
        assert each["right"] == sorted(set(each["right"]) & set(range(sheets.COUNT)))
        assert files[each["sheet"]].stat().st_size < 300_000
        width, height = Image.open(files[each["sheet"]]).size
        assert width % sheets.COLUMNS == 0
        assert height % (sheets.COUNT // sheets.COLUMNS) == 0
