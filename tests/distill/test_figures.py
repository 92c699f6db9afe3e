"""The figures of a report: what counts as better, and what is kept."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from wadi.distill.figures import Figure, headline, pixel_figures, read_figures
from wadi.errors import WadiError

NAN = float("nan")
FIGURE = Figure("Alignment", 0.1, 0.78, 0.997, "higher", "Share of sentences that the image obeys.")


@pytest.mark.parametrize(
    ("better", "before", "after", "teacher", "improved"),
    [
        ("higher", 0.1, 0.5, None, True),
        ("higher", 0.5, 0.51, 1.0, False),  # 2 % say nothing
        ("higher", 0.5, 0.4, None, False),
        ("higher", 0.0, 0.1, None, True),
        ("higher", -1.0, -0.5, None, True),
        ("lower", 100.0, 50.0, None, True),
        ("lower", 100.0, 99.0, None, False),
        ("lower", 0.0, 0.0, None, False),
        ("closer", 10.0, 30.0, 40.0, True),
        ("closer", 90.0, 60.0, 40.0, True),
        ("closer", 39.0, 80.0, 40.0, False),
        ("closer", 40.0, 41.0, 40.0, False),  # the teacher's already
        ("closer", 40.0, 40.0, 40.0, False),
        *((better, NAN, 1.0, 2.0, False) for better in ("higher", "lower", "closer")),
        *((better, 1.0, NAN, 2.0, False) for better in ("higher", "lower", "closer")),
    ],
)
def test_better_is_clearly_better_in_the_right_direction(better, before, after, teacher, improved):
    assert Figure("", before, after, teacher, better, "").improved == improved


def test_the_headline_counts_and_claims_no_more():
    worse = dataclasses.replace(FIGURE, after=0.1)
    assert headline(4, [worse, worse]) == "Distilled with 4 updates: none of 2 figures better than before"
    assert headline(20_000, [worse, FIGURE]).endswith("20,000 updates: 1 of 2 figures better than before")
    assert headline(1, [FIGURE]) == "Distilled with 1 update: 1 of 1 figures better than before"


def images(seeds, blur=1):
    """Noise that is constant over blocks of so many pixels."""

    def one(seed):
        small = np.random.default_rng(seed).integers(256, size=(32 // blur, 32 // blur, 3), dtype=np.uint8)
        return Image.fromarray(small.repeat(blur, 0).repeat(blur, 1))

    return [[one(seed) for seed in row] for row in seeds]


def test_figures_of_pixels_tell_collapse_and_blur():
    varied, collapsed = images([[0, 1, 2], [3, 4, 5]]), images([[0, 0, 0], [3, 3, 3]])
    spread, detail = pixel_figures(before=collapsed, after=varied, teacher=varied)
    assert (spread.before, spread.improved) == (0.0, True)
    assert spread.after == spread.teacher > 50
    blurred = images([[0, 1, 2], [3, 4, 5]], blur=8)
    spread, detail = pixel_figures(before=blurred, after=varied, teacher=varied)
    assert detail.before < 0.2 * detail.after
    assert detail.improved
    (alone,) = pixel_figures(*[images([[0], [1]])] * 3)  # one image of a prompt has no spread
    assert alone.name == "Detail"


def test_figures_that_were_kept_are_read(tmp_path):
    path = tmp_path / "figures.json"
    for figure in (
        FIGURE,
        dataclasses.replace(FIGURE, teacher=None),
        dataclasses.replace(FIGURE, better="closer"),
    ):
        path.write_text(json.dumps([dataclasses.asdict(figure)]))
        assert read_figures(path) == [figure]


@pytest.mark.parametrize(
    "content",
    [
        "3",
        '{"name": "Alignment"}',
        "[[1]]",
        '[{"name": "Alignment"}]',
        json.dumps([dataclasses.asdict(FIGURE) | {"more": 1}]),
        json.dumps([dataclasses.asdict(FIGURE) | {"before": "0.1"}]),
        json.dumps([dataclasses.asdict(FIGURE) | {"better": "nearer"}]),
        json.dumps([dataclasses.asdict(FIGURE) | {"better": "closer", "teacher": None}]),
    ],
)
def test_other_figures_are_one_line(tmp_path, content):
    (tmp_path / "figures.json").write_text(content)
    with pytest.raises(WadiError, match=r"figures\.json: not a list of figures, .*delete it") as error:
        read_figures(tmp_path / "figures.json")
    assert "\n" not in str(error.value)
