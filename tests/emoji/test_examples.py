"""Relations that no caption names: what is drawn is what is read, and pairs are kept apart."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from tests.emoji.cases import synthetic_atlas
from wadi import WadiError
from wadi.emoji.captions import Caption, is_held_out_pair, stated
from wadi.emoji.examples import (
    RELATIONS,
    RelationExamplesConfig,
    relation_caption,
    relation_examples,
    relation_pairs,
    relation_right,
    relation_scenes,
)
from wadi.emoji.glyphs import NAMES
from wadi.emoji.judge import Reading
from wadi.emoji.scenes import sample_scenes
from wadi.files import save_tensors
from wadi.tasks.exemplars import read_exemplars

PAIRS = relation_pairs(500, "test", held_out=False)


def reading(scenes):
    """A judge that errs nowhere."""
    blank = torch.zeros(len(scenes))
    return Reading(
        emoji=scenes.emoji,
        score=torch.ones(len(scenes), 2),
        center=scenes.center,
        size=scenes.size,
        background=blank.long(),
        features=blank[:, None],
    )


@pytest.mark.parametrize("relation", RELATIONS)
def test_what_is_drawn_holds_inside_the_picture_whichever_object_is_read_first(relation):
    scenes = relation_scenes(relation, PAIRS, seed=1)
    right = relation_right(reading(scenes), torch.tensor(PAIRS), relation)
    assert right["objects"].all()
    assert right["relation"].all()
    turned = reading(scenes)
    turned = dataclasses.replace(
        turned,
        **{name: getattr(turned, name).flip(1) for name in ("emoji", "center", "size")},
    )
    assert relation_right(turned, torch.tensor(PAIRS), relation)["relation"].all()
    low = (scenes.center - scenes.size[..., None] / 2).amin()
    high = (scenes.center + scenes.size[..., None] / 2).amax()
    assert low > -0.1
    assert high < 1.1


@pytest.mark.parametrize("relation", [name for name in RELATIONS if name != "beside"])
def test_the_other_way_round_and_other_objects_do_not_hold(relation):
    scenes = relation_scenes(relation, PAIRS, seed=2)
    right = relation_right(reading(scenes), torch.tensor(PAIRS).flip(1), relation)
    assert right["objects"].all()
    assert not right["relation"].any()
    others = (torch.tensor(PAIRS) + 1) % len(NAMES)
    assert relation_right(reading(scenes), others, relation)["relation"].double().mean() < 0.01


@pytest.mark.parametrize(
    ("relation", "low", "high"),
    [
        ("beside", 0.4, 0.6),
        ("below", 0.2, 0.3),
        ("right-of", 0.2, 0.3),
        ("diagonal", 0, 0),
        ("on-top", 0, 0.01),
        ("corner", 0, 0),
    ],
)
def test_how_often_the_training_shows_a_relation(relation, low, high):
    captions = [Caption(emoji=pair, relation=0) for pair in PAIRS * 10]
    scenes = sample_scenes(stated(captions), torch.Generator().manual_seed(0))
    pairs = torch.tensor(PAIRS * 10)
    share = relation_right(reading(scenes), pairs, relation)["relation"].double().mean().item()
    assert low <= share <= high
    assert RELATIONS[relation].shown == (share > 0.01)


def test_pairs_are_different_and_of_the_split_asked_for():
    assert len(set(PAIRS)) == 500
    assert not any(is_held_out_pair(*pair) for pair in PAIRS)
    held_out = relation_pairs(504, 0, held_out=True)
    assert all(is_held_out_pair(a, b) and a != b for a, b in held_out)
    with pytest.raises(WadiError, match="from 1 to 504"):
        relation_pairs(505, 0, held_out=True)


def test_the_folder_is_one_that_exemplars_are_read_from(tmp_path, capsys):
    save_tensors(tmp_path / "atlas.safetensors", {"atlas": synthetic_atlas()})
    options = {"relation": "corner", "count": 4, "word": "<c>", "atlas": tmp_path / "atlas.safetensors"}
    relation_examples(RelationExamplesConfig(out=tmp_path / "out", **options))
    exemplars = read_exemplars(tmp_path / "out")
    pairs = relation_pairs(4, 0, held_out=False)
    assert exemplars.captions == tuple(relation_caption(pair, "<c>") for pair in pairs)
    assert exemplars.images[0].size == (64, 64)
    rows = (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(row)["file_name"] for row in rows] == [f"{i:03d}.png" for i in range(4)]
    assert "4 images, a small first one in the upper right corner" in capsys.readouterr().out
    before = [image.tobytes() for image in exemplars.images]
    relation_examples(RelationExamplesConfig(out=tmp_path / "again", **options))
    assert [Image.open(path).tobytes() for path in read_exemplars(tmp_path / "again").paths] == before
