"""docs/evidence.md says what the result files say, and the intervals are those of the statistics."""

import math
import re
from pathlib import Path

import ablation
import evidence
import numpy as np
import pytest

from wadi.errors import WadiError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [  # of printed tables
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 10, 2.22814),
        (0.9, 7, 1.41492),
        (0.975, 1e6, 1.95997),
        (0.025, 4, -2.77645),
    ],
)
def test_quantiles(probability, freedom, expected):
    assert evidence.student_t_quantile(probability, freedom) == pytest.approx(expected, rel=3e-6)


def test_interval():
    """1, 2, 3: deviation 1, so 4.30265 / sqrt(3)."""
    found = evidence.estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2, 3)
    assert found.half == pytest.approx(2.48414, rel=1e-5)
    assert evidence.estimate([1.0]).half is None


def test_difference():
    """Equal sizes and deviations: 2 (n - 1) degrees of freedom, as in the classical test."""
    found = evidence.difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert found.mean == 1
    assert found.half == pytest.approx(2.77645 * math.sqrt(2 / 3), rel=1e-5)
    # one of the two without scatter: the degrees of freedom are the other's
    assert evidence.difference([1.0, 2.0, 3.0], [5.0] * 9).half == pytest.approx(2.48414, rel=1e-5)
    assert evidence.difference([1.0, 1.0], [2.0, 2.0]).half == 0
    assert evidence.difference([1.0], [2.0, 2.1]).half is None


def test_interval_covers():
    """Of 2000 intervals of five normal numbers each 95 % hold the truth; so do Welch's."""
    generator = np.random.default_rng(0)
    samples = generator.normal(0, (1, 3), (2000, 5, 2))
    found = [evidence.estimate(list(row)) for row in samples[..., 0]]
    assert sum(abs(each.mean) < each.half for each in found) / 2000 == pytest.approx(0.95, abs=0.015)
    found = [evidence.difference(list(row[:, 0]), list(row[:, 1])) for row in samples]
    assert sum(abs(each.mean) < each.half for each in found) / 2000 == pytest.approx(0.95, abs=0.015)


def test_choice():
    assert evidence.choose_rate({1e-3: [2.0, 2.2], 3e-3: [1.5, 2.6], 1e-4: [3.0]}) == 3e-3
    # the best of the runs that finished, but another of its rate did not
    assert evidence.choose_rate({1e-3: [2.0, 2.2], 3e-3: [1.0, None]}) == 1e-3
    assert evidence.choose_rate({3e-3: [2.0], 1e-3: [2.0]}) == 1e-3
    with pytest.raises(WadiError, match=r"none of the learning rates 1e-3, 3e-3 gave figures"):
        evidence.choose_rate({1e-3: [None], 3e-3: [None]})


def test_there_is_a_table_for_every_suite():
    assert set(ablation.SUITES) <= set(evidence.TABLES)


def test_the_page_is_what_the_files_give(tmp_path):
    """Written again from the results, no letter of it changes, and every plot that it shows is drawn."""
    page, results = tmp_path / "evidence.md", DOCS / "results" / "ablation"
    text = (DOCS / "evidence.md").read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    evidence.main(evidence.Options(page, results, tmp_path / "images"))
    assert page.read_text(encoding="utf-8") == text
    shown = set(re.findall(r"\(images/(evidence-[^)]+)\)", text))
    assert {path.name for path in (tmp_path / "images").iterdir()} == shown
    page.write_text(text.replace("<!-- /table -->", "a line by hand\n<!-- /table -->", 1), encoding="utf-8")
    options = evidence.Options(page, results, tmp_path / "images", check=True)
    assert evidence.main(options) == 1
