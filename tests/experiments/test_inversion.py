"""The experiment on relations runs, and its words and pairs are what it says."""

import dataclasses

import inversion
from PIL import Image

from wadi.emoji.captions import is_held_out_pair
from wadi.files import read_json

TINY = inversion.Options(
    relations=("below", "diagonal"),
    ways=("learned",),
    subjects=("rocket",),
    seeds=1,
    exemplars=2,
    max_train_steps=1,
    train_batch_size=1,
    rates=(0.1,),
    subject_rates=(0.1,),
    lowest=(0, 600),
    steering=(0.1,),
    pairs=3,
    selection_pairs=1,
    num_inference_steps=1,
    device="cpu",
)


def test_figures_and_picture(atlas, tmp_path, capsys):
    out, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    inversion.main(dataclasses.replace(TINY, atlas=atlas, out=out, picture=picture))
    found = read_json(out)
    assert len(found["choice"]) == 2
    assert found["chosen"]["lowest_timestep"] in (0, 600)
    ways = {(row["relation"], row["way"]) for row in found["rows"]}
    assert {("below", "its own words"), ("diagonal", "learned"), ("diagonal", '"and"')} <= ways
    assert ("diagonal", "its own words") not in ways
    assert all(0 <= row["student relation"] <= row["student objects"] <= 1 for row in found["rows"])
    assert [row["time_ratio"] > 0 for row in found["summary"]] == [True] * 3
    printed = capsys.readouterr().out
    assert "| below | random embedding |" in printed
    assert "| rocket | its own name |" in printed
    assert [row["way"] for row in found["subjects"]["student"]] == ["learned", "its own name"]
    assert Image.open(picture).width > 8 * 128


def test_options_are_chosen_on_other_pairs_than_those_reported_all_never_seen():
    chosen, reported = inversion.pairs_of(inversion.Options())
    assert not set(chosen) & set(reported)
    assert all(is_held_out_pair(a, b) for a, b in (*chosen, *reported))


def test_captions_of_a_subject_state_more_than_its_name():
    captions = inversion.subject_captions("rocket", 20)
    assert len(captions) == 20
    assert all("rocket" in caption.text and len(caption.text.split()) > 2 for caption in captions)
    assert all((c.size, c.place, c.background) != (None, None, None) for c in captions)
