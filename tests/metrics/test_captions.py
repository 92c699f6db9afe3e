"""Which captions are chosen, and from what."""

import hashlib
import json

import pytest

from wadi.errors import WadiError
from wadi.metrics.captions import choose_captions


def coco(path, rows):
    keys = ("id", "image_id", "caption")
    path.write_text(json.dumps({"annotations": [dict(zip(keys, row, strict=True)) for row in rows]}))
    return path


def test_coco_gives_one_caption_a_picture_the_oldest(tmp_path):
    rows = [(7, 2, "a dog"), (3, 1, "a  cat\n"), (5, 2, "two dogs"), (9, 3, "a cat")]
    path = coco(tmp_path / "captions.json", rows)
    chosen = choose_captions(path, 3, seed=0)
    assert chosen.captions == ("a cat", "two dogs", "a cat")  # alike, but of two pictures
    assert chosen.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert chosen.choice_sha256 == hashlib.sha256(b"a cat\ntwo dogs\na cat\n").hexdigest()


def test_the_choice_is_of_the_seed_alone_and_keeps_the_order(tmp_path):
    path = coco(tmp_path / "captions.json", [(i, i, f"caption {i:03d}") for i in range(200)])
    one, again, other = (choose_captions(path, 50, seed) for seed in (1, 1, 2))
    assert one == again
    assert one.choice_sha256 != other.choice_sha256
    assert len(set(one.captions)) == 50
    assert list(one.captions) == sorted(one.captions)
    # drawn from all of them: a mean of 50 of 0..199 has a deviation of 7.1
    assert 70 < sum(int(caption[-3:]) for caption in one.captions) / 50 < 129


def test_tables_and_text_as_in_training(tmp_path):
    (tmp_path / "a.csv").write_text("id,caption\n1,a cat\n2,a dog\n")
    (tmp_path / "a.txt").write_text("a cat\n\na dog\n")
    assert choose_captions(tmp_path / "a.csv", 2, 0).captions == ("a cat", "a dog")
    assert choose_captions(tmp_path / "a.txt", 2, 0).captions == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "0 captions, fewer than --num-samples 1"),
        ('{"a": 1}', "nor COCO"),
        ('{"annotations": [{"id": 1}]}', "not COCO"),
        ('{"annotations": 3}', "not COCO"),
        ("{", "not valid JSON"),
        ('{"annotations": []}', "0 captions, fewer than --num-samples 1"),
    ],
)
def test_other_files_are_one_line(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(WadiError, match=message) as error:
        choose_captions(tmp_path / "c.json", 1, 0)
    assert "c.json" in str(error.value)
    with pytest.raises(WadiError, match="could not read the captions"):
        choose_captions(tmp_path / "none.json", 1, 0)
