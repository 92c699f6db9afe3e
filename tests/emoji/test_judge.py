"""What counts as right, on readings made by hand; the grid; the shipped judge on real pictures."""

import math

import pytest
import torch

from tests.emoji.cases import needs_font
from wadi.emoji import assets_folder
from wadi.emoji.captions import parse_caption, stated
from wadi.emoji.glyphs import NAMES, load_atlas
from wadi.emoji.judge import Judge, Reading, attributes_right
from wadi.emoji.train_judge import real_images
from wadi.errors import WadiError
from wadi.files import load_tensors, save_tensors
from wadi.metrics import feature_statistics, frechet_distance

PARTS = ("emoji", "size", "place", "relation", "background")


def read(first="cat", second="dog", at=(0.5, 0.5), second_at=(0.5, 0.5), size=0.4, background=0):
    """A reading of one picture."""
    return Reading(
        emoji=torch.tensor([[NAMES.index(first), NAMES.index(second)]]),
        score=torch.ones(1, 2),
        center=torch.tensor([[at, second_at]]),
        size=torch.tensor([[size, size]]),
        background=torch.tensor([background]),
        features=torch.zeros(1, 128),
    )


@pytest.mark.parametrize(
    ("caption", "reading", "wrong"),
    [
        ("a cat", read(), ()),
        ("a cat", read(first="dog", second="cat"), ("emoji",)),  # one object: only the strongest counts
        ("a cat", read(at=(0.1, 0.9), size=0.7, background=7), ()),  # all else is left free
        # The threshold between small and big is at half of the side.
        ("a small cat", read(size=0.49), ()),
        ("a small cat", read(size=0.51), ("size",)),
        ("a big cat", read(size=0.51), ()),
        ("a big cat", read(size=0.49), ("size",)),
        # An object of 0.4 has room 0.3 to each side; 0.36 of that is 0.108.
        ("a cat on the left", read(at=(0.39, 0.5)), ()),
        ("a cat on the left", read(at=(0.40, 0.5)), ("place",)),
        ("a cat on the right", read(at=(0.61, 0.5)), ()),
        ("a cat on the right", read(at=(0.60, 0.5)), ("place",)),
        ("a cat at the top", read(at=(0.9, 0.39)), ()),
        ("a cat at the top", read(at=(0.5, 0.61)), ("place",)),
        ("a cat at the bottom", read(at=(0.1, 0.61)), ()),
        ("a cat at the bottom", read(at=(0.5, 0.39)), ("place",)),
        ("a cat in the center", read(at=(0.40, 0.60)), ()),
        ("a cat in the center", read(at=(0.39, 0.5)), ("place",)),
        ("a cat in the center", read(at=(0.5, 0.61)), ("place",)),
        # The same place of an object of 0.7, whose room is 0.15.
        ("a cat on the left", read(at=(0.44, 0.5), size=0.7), ()),
        ("a cat on a red background", read(background=0), ()),
        ("a cat on a red background", read(background=1), ("background",)),
        # Two objects count in either order, but both must be there.
        ("a cat and a dog", read(), ()),
        ("a dog and a cat", read(), ()),
        ("a cat and an owl", read(), ("emoji",)),
        ("a cat left of a dog", read(at=(0.25, 0.5), second_at=(0.75, 0.5)), ()),
        ("a dog left of a cat", read(at=(0.75, 0.5), second_at=(0.25, 0.5)), ()),
        ("a dog left of a cat", read(at=(0.25, 0.5), second_at=(0.75, 0.5)), ("relation",)),
        ("a cat left of a dog", read(at=(0.75, 0.5), second_at=(0.25, 0.5)), ("relation",)),
        ("a cat left of a dog", read(at=(0.4, 0.2), second_at=(0.6, 0.8)), ("relation",)),
        ("a cat above a dog", read(at=(0.4, 0.2), second_at=(0.6, 0.8)), ()),
        ("a dog above a cat", read(at=(0.4, 0.8), second_at=(0.6, 0.2)), ()),
        ("a dog above a cat", read(at=(0.4, 0.2), second_at=(0.6, 0.8)), ("relation",)),
        (
            "a big owl at the top on a white background",
            read(size=0.3, at=(0.5, 0.6)),
            ("emoji", "size", "place", "background"),
        ),
    ],
)
def test_what_is_right(caption, reading, wrong):
    right = attributes_right(reading, stated([parse_caption(caption)]))
    assert {name for name in PARTS if not right[name]} == set(wrong)
    assert bool(right["all"]) == (not wrong)


def test_two_objects_are_read_off_the_grid(monkeypatch):
    """A strong object lights up its neighbours; the second object is the best of the cells farther away."""
    cells = torch.zeros(1, len(NAMES) + 1, 8, 8)
    cells[:, -1] = 10.0  # nothing
    for emoji, row, column, logit in ((5, 1, 2, 30.0), (5, 2, 3, 25.0), (9, 6, 5, 20.0)):
        cells[0, emoji, row, column] = logit
    box = torch.full((1, 3, 8, 8), 0.5)
    box[0, :, 1, 2] = torch.tensor([0.25, 0.75, 0.42])
    heads = {"cells": cells, "box": box, "features": torch.zeros(1, 128), "background": torch.eye(10)[3:4]}
    judge = Judge()
    monkeypatch.setattr(judge, "forward", lambda images: heads)
    reading = judge.read(torch.zeros(1, 3, 64, 64))
    assert reading.emoji.tolist() == [[5, 9]]
    assert reading.center[0].tolist() == [[2.25 / 8, 1.75 / 8], [5.5 / 8, 6.5 / 8]]
    assert reading.size[0].tolist() == pytest.approx([0.42, 0.5])
    nothing = [71 * math.exp(-logit) + math.exp(10 - logit) for logit in (30, 20)]
    assert reading.score[0].tolist() == pytest.approx([1 / (1 + x) for x in nothing], abs=1e-6)
    assert reading.background.tolist() == [3]


def test_reading_does_not_depend_on_batches_or_dtype():
    images = torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    judge = Judge.load(assets_folder() / "judge.safetensors")
    whole, parts, floats = judge.read(images), judge.read(images, batch_size=2), judge.read(images / 255)
    for other in (parts, floats):
        torch.testing.assert_close(other.features, whole.features, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.emoji, whole.emoji)


def test_weights_come_back(tmp_path):
    torch.manual_seed(0)
    judge = Judge()
    judge.save(tmp_path / "judge.safetensors", torch.float32)
    loaded = Judge.load(tmp_path / "judge.safetensors")
    assert all(torch.equal(value, judge.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("tensors", [{"atlas": torch.zeros(3)}, {"stem.weight": torch.zeros(3)}])
def test_other_weights_are_refused(tensors, tmp_path):
    save_tensors(tmp_path / "other.safetensors", tensors)
    with pytest.raises(WadiError, match=r"other\.safetensors: not the weights of this judge"):
        Judge.load(tmp_path / "other.safetensors")


def test_shipped_reference_statistics():
    reference = load_tensors(assets_folder() / "reference.safetensors")
    assert reference["count"] == 10_000
    assert reference["features"].shape == (4000, 128)
    assert frechet_distance(reference, reference) == pytest.approx(0, abs=1e-6)
    # A part of the same pictures: near, but more than nothing.
    assert 0 < frechet_distance(reference, feature_statistics(reference["features"])) < 1


@needs_font
def test_shipped_judge_reads_real_pictures():
    images, columns = real_images("tests of the judge", 100, load_atlas(), seed=1)
    right = attributes_right(Judge.load(assets_folder() / "judge.safetensors").read(images), columns)
    assert right["all"].double().mean() >= 0.99


def test_images_of_another_size_are_refused_in_one_line():
    with pytest.raises(WadiError, match=r"64 x 64 pixels, and these have 32 x 48; give --resolution 64"):
        Judge().read(torch.zeros(1, 3, 32, 48))
