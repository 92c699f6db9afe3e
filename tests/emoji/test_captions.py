"""The grammar there and back, and what training never sees."""

import json
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given

from tests.emoji.cases import captions
from wadi import cli
from wadi.emoji import prompts_file
from wadi.emoji.captions import (
    COLOURS,
    RELATIONS,
    SIZES,
    Caption,
    Focus,
    is_held_out,
    is_held_out_pair,
    parse_caption,
    sample_captions,
    stated,
)
from wadi.emoji.glyphs import NAMES
from wadi.errors import WadiError


def single(name, **attributes):
    return Caption((NAMES.index(name),), **attributes)


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        (single("bunch of grapes"), "a bunch of grapes"),
        (single("apple"), "an apple"),
        (single("unicorn"), "a unicorn"),
        (single("apple", size=1), "a big apple"),
        (single("egg", place=0), "an egg on the left"),
        (single("dog", background=1, lead=2), "an image of a dog on an orange background"),
        (
            Caption((NAMES.index("cat"), NAMES.index("owl")), relation=1, background=4),
            "a cat left of an owl on a blue background",
        ),
    ],
)
def test_english(caption, text):
    assert caption.text == text
    assert parse_caption(text) == caption


@given(captions)
def test_parsing_reads_every_caption_back(caption):
    assert parse_caption(caption.text) == caption


@pytest.mark.parametrize(
    "text",
    [
        "",
        "panda",
        "a zebra",
        "a panda on a black background",
        "a big cat and a dog",
        "a cat and a dog on the left",
        "a cat left of a dog left of an owl",
        "a panda!",
    ],
)
def test_other_prompts_are_refused(text):
    with pytest.raises(WadiError, match="not a caption of the emoji world"):
        parse_caption(text)


def test_case_and_spaces_do_not_matter():
    assert parse_caption("  A Big Panda ") == single("panda", size=1)


def backgrounds_shown(captions):
    return {(emoji, c.background) for c in captions for emoji in c.emoji if c.background is not None}


def pairs_shown(captions):
    return {frozenset(c.emoji) for c in captions if len(c.emoji) == 2}


def test_training_misses_one_background_of_each_emoji_and_held_out_captions_need_it():
    train = sample_captions(30_000, "a test")
    held_out = sample_captions(2000, "a test", split="held-out")
    shown = backgrounds_shown(train)
    for emoji in range(len(NAMES)):
        assert sum((emoji, colour) in shown for colour in range(len(COLOURS))) == len(COLOURS) - 1
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))
    pairs = pairs_shown(train)
    for caption in held_out:
        new_background = not backgrounds_shown([caption]) <= shown
        new_pair = not pairs_shown([caption]) <= pairs
        assert new_background or new_pair


def test_a_tenth_of_the_pairs_is_held_out_in_either_order():
    pairs = list(combinations(range(len(NAMES)), 2))
    held_out = [pair for pair in pairs if is_held_out_pair(*pair)]
    assert len(held_out) / len(pairs) == pytest.approx(0.1, abs=0.005)
    assert all(is_held_out_pair(second, first) for first, second in held_out)


def test_a_seed_names_a_list():
    assert sample_captions(50, 3) == sample_captions(100, 3)[:50]
    assert sample_captions(50, 3) != sample_captions(50, 4)
    assert sample_captions(50, 3) != sample_captions(50, 3, split="held-out")


def test_shipped_prompts_are_captions_of_the_training_split():
    prompts = prompts_file().read_text().splitlines()
    assert len(prompts) == 20_000
    captions = [parse_caption(prompt) for prompt in prompts]
    assert [caption.text for caption in captions] == prompts
    assert not any(map(is_held_out, captions))


def test_stated_marks_what_is_left_free():
    columns = stated([single("dog", size=0, background=9), Caption((3, 5), relation=2, lead=1)])
    assert {name: column.tolist() for name, column in columns.items()} == {
        "emoji": [[NAMES.index("dog"), -1], [3, 5]],
        "size": [0, -1],
        "place": [-1, -1],
        "relation": [-1, 2],
        "background": [9, -1],
    }


def test_the_command_writes_the_shipped_prompts_or_more_pairs(tmp_path):
    path = tmp_path / "prompts.txt"
    assert cli.main(["emoji", "prompts", "--out", str(path)]) == 0
    assert path.read_text() == prompts_file().read_text()
    options = ["--num-prompts", "4000", "--pair-share", "0.6", "--seed", "more", "--overwrite"]
    assert cli.main(["emoji", "prompts", "--out", str(path), *options]) == 0
    written = [parse_caption(line) for line in path.read_text().splitlines()]
    assert len(written) == 4000
    assert not any(map(is_held_out, written))
    # a pair is drawn again where it, or the background with either, is held out: with 0.1 + 0.9 / 2 * 0.19,
    # a single object with 0.1 / 2; so 0.6 of pairs become 0.6 * 0.8145 / (0.6 * 0.8145 + 0.4 * 0.95)
    share = sum(len(caption.emoji) == 2 for caption in written) / 4000
    assert share == pytest.approx(0.5626, abs=0.025)  # three standard deviations


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--num-prompts", "0"], "--num-prompts 0: must be at least 1"),
        (["--pair-share", "1.5"], "--pair-share: must be between 0 and 1, but is 1.5"),
        (["--seed", "test"], "--seed: test makes the captions of the evaluation; name another seed"),
    ],
)
def test_bad_options_write_nothing(tmp_path, capsys, options, line):
    assert cli.main(["emoji", "prompts", "--out", str(tmp_path / "p.txt"), *options]) == 2
    assert line in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def shares_right(emoji=(), sizes=(), relations=()):
    """As `wadi emoji evaluate --out` writes them: all right, but for those given."""
    named = (("emoji", NAMES, emoji), ("size", SIZES, sizes), ("relation", RELATIONS, relations))
    return {kind: dict.fromkeys(names, 1.0) | dict(wrong) for kind, names, wrong in named}


def test_a_focus_shares_the_weight_out_by_errors():
    right = shares_right({"cat": 0.9, "owl": 0.7}, {"big": 0.5})
    focus = Focus.on_errors(right, 0.5)
    even = 0.5 / len(NAMES)
    expected = {"cat": even + 0.5 * 0.1 / 0.4, "owl": even + 0.5 * 0.3 / 0.4}
    assert dict(zip(NAMES, focus.emoji, strict=True)) == pytest.approx(dict.fromkeys(NAMES, even) | expected)
    assert focus.size[SIZES.index("big")] == pytest.approx(0.5 / len(SIZES) + 0.5)
    assert focus.relation == pytest.approx([1 / len(RELATIONS)] * len(RELATIONS))  # none wrong: evenly
    assert sum(focus.emoji) == pytest.approx(1)


def test_focused_prompts_name_what_came_out_wrong_more_often(tmp_path):
    wrong = dict.fromkeys(NAMES[:4], 0.6)
    (tmp_path / "errors.json").write_text(
        json.dumps({"alignment_by": shares_right(wrong, relations={"and": 0.0})})
    )
    options = ["--num-prompts", "6000", "--pair-share", "0.5", "--focus-on", str(tmp_path / "errors.json")]
    assert cli.main(["emoji", "prompts", "--out", str(tmp_path / "p.txt"), *options]) == 0
    written = [parse_caption(line) for line in (tmp_path / "p.txt").read_text().splitlines()]
    assert not any(map(is_held_out, written))
    singles = Counter(c.emoji[0] for c in written if len(c.emoji) == 1)
    # half of them evenly, half on the four; none of the four is held out more often than others
    share = sum(singles[i] for i in range(4)) / singles.total()
    assert share == pytest.approx(0.5 * 4 / len(NAMES) + 0.5, abs=0.03)
    relations = Counter(c.relation for c in written if len(c.emoji) == 2)
    expected = 0.5 / len(RELATIONS) + 0.5
    assert relations[RELATIONS.index("and")] / relations.total() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "no.json"),
        ("not json", "not valid JSON"),
        ('{"figures": {}}', "has no shares by emoji; make it with `wadi emoji evaluate --out`"),
        ('{"alignment_by": {"emoji": [], "size": {}, "relation": {}}}', "has no shares by emoji"),
        (json.dumps({"alignment_by": shares_right({"cat": 1.5})}), "shares that are not between 0 and 1"),
    ],
)
def test_files_that_tell_no_errors_are_refused(tmp_path, capsys, content, line):
    path = tmp_path / "no.json"
    if content is not None:
        path.write_text(content)
    command = ["emoji", "prompts", "--out", str(tmp_path / "p.txt"), "--focus-on", str(path)]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert line in error
    assert str(path) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "p.txt").exists()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_focus_share_out_of_its_range(tmp_path, capsys, share):
    (tmp_path / "errors.json").write_text(json.dumps({"alignment_by": shares_right()}))
    options = ["--focus-on", str(tmp_path / "errors.json"), f"--focus-share={share}"]
    assert cli.main(["emoji", "prompts", "--out", str(tmp_path / "p.txt"), *options]) == 2
    assert f"--focus-share: must be at least 0 and less than 1, but is {share}" in capsys.readouterr().err
