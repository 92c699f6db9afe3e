"""The table of kinds of prompts: what is drawn is held out, and figures count what they say."""

import importlib
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from wadi.emoji.captions import Caption, is_held_out, parse_caption
from wadi.emoji.judge import NUM_FEATURES, Reading
from wadi.errors import WadiError
from wadi.files import read_json

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def prompts():
    sys.path.insert(0, str(EXPERIMENTS))
    yield importlib.import_module("prompts")
    sys.path.remove(str(EXPERIMENTS))


def test_kinds_are_what_they_say(prompts):
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


def test_words_beyond_the_grammar(prompts):
    rng = random.Random(0)
    below = prompts._below(rng)
    assert " below " in below.text
    assert below.text.endswith(Caption(emoji=below.caption.emoji[:1]).text)  # the upper one comes last
    sized = prompts._sized_pair(rng, True)
    first, second = sized.text.split(" above ")
    assert ("small" in first, "small" in second) == (sized.smaller == 0, sized.smaller == 1)
    assert f" {prompts.COLOURS[sized.colour]} " in first


def reading(emoji, size, background, center=((0.5, 0.2), (0.5, 0.8))):
    count = len(emoji)
    return Reading(
        emoji=torch.tensor(emoji),
        score=torch.ones(count, 2),
        center=torch.tensor([center] * count),
        size=torch.tensor(size),
        background=torch.tensor(background),
        features=torch.zeros(count, NUM_FEATURES),
    )


def test_figures_by_hand(prompts):
    caption = Caption(emoji=(3, 7), relation=2)  # 3 above 7
    asked = [prompts.Asked("", caption, smaller=0, colour=4)] * 4
    found = prompts.figures(
        reading(
            [[3, 7], [3, 7], [7, 3], [3, 8]],  # the third is upside down, the fourth shows another
            [[0.3, 0.4], [0.5, 0.4], [0.4, 0.3], [0.3, 0.4]],  # of the second the wrong one is smaller
            [4, 0, 0, 4],
        ),
        asked,
    )
    assert found == {"all": 0.25, "objects": 0.75, "relation": 0.75, "sizes": 0.75, "leaked": 0.5}


def test_it_runs(prompts, tmp_path, monkeypatch):
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
