"""The charts of a report show what was logged, however little that is."""

import re

import pytest

from wadi.distill.charts import FEW, loss_curves

NAN, INFINITE = float("nan"), float("inf")


def row(step, loss):
    return {"step": step, "student_loss": loss, "fake_loss": loss}


def markers(svg):
    """How many points are marked; a line has no markers of its own."""
    return len(
        re.findall(r'<use xlink:href="#\w+" x="[\d.]+" y="[\d.]+" style="fill: #(?:2563eb|d97706)', svg)
    )


@pytest.mark.parametrize(
    ("rows", "marked"),
    [
        ([row(4, 0.1)], 1),
        ([row(4, 0.0)], 1),
        ([row(4, -0.1)], 1),
        ([row(1, 0.1), row(2, 0.3)], 2),
        ([row(1, NAN), row(2, 0.3)], 1),
        ([row(1, 0.1), {"step": 2}, row(3, INFINITE)], 1),
        ([row(s, 1 / s) for s in range(1, FEW + 2)], 0),
    ],
)
def test_few_points_are_marked(rows, marked):
    svg = loss_curves(rows)
    assert markers(svg) == 2 * marked
    assert "no loss" not in svg
    assert "NaN" not in svg
    assert svg.count(">update<") == 2
    assert svg.count(">loss") == 2
    assert svg.startswith('<svg role="img" aria-label="Losses')


@pytest.mark.parametrize("rows", [[], [{"step": 1}], [row(1, NAN), row(2, INFINITE)]])
def test_nothing_logged_is_said(rows):
    assert loss_curves(rows).count(">no loss was logged<") == 2
