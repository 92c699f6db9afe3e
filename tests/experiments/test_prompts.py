"""The table of kinds of prompts: what is drawn is held out where it says so, and the experiment runs."""

import prompts
import pytest
from PIL import Image

from wadi.emoji.captions import is_held_out, parse_caption
from wadi.errors import WadiError
from wadi.files import read_json


def test_kinds_are_what_they_say():
    for kind in prompts.KINDS:
        drawn = prompts.drawn(kind, 40)
        assert drawn == prompts.drawn(kind, 40)
        assert len({each.text for each in drawn}) > 20
        for each in drawn:
            if kind.taught:
                assert parse_caption(each.text) == each.caption
                assert is_held_out(each.caption) == kind.held_out
            else:
                with pytest.raises(WadiError):
                    parse_caption(each.text)


def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "STEPS", 2)
    monkeypatch.setattr(prompts, "KINDS", (prompts.KINDS[3], prompts.KINDS[-1]))
    out, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    prompts.main(prompts.Options(samples=2, timed=1, device="cpu", out=out, picture=picture))
    found = read_json(out)
    assert [row["kind"] for row in found["rows"]] == [kind.name for kind in prompts.KINDS]
    assert "leaked" in found["rows"][1]["student"]
    taught, beyond = found["summary"]
    assert taught["student"] == found["rows"][0]["student"]["all"]
    assert beyond["teacher"] == found["rows"][1]["teacher"]["all"]
    assert Image.open(picture).height > 2 * 128
    with pytest.raises(WadiError, match="--samples"):
        prompts.main(prompts.Options(samples=0))
