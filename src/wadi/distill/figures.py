"""The figures of a report: what they are, what they say, and those that can be measured of any model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from wadi.errors import WadiError
from wadi.files import read_json
from wadi.metrics.pixels import VIEWED_AT, pixel_detail, pixel_spread

Better = Literal["higher", "lower", "closer"]
"""Which values are better; "closer" is closer to the teacher's."""

CLEARLY = 0.05
"""A figure counts as better than before only if its `Figure.gain` is larger than this."""

Rows = Sequence[Sequence[Image.Image]]
"""Images by prompt, then by seed."""


@dataclass(frozen=True)
class Figure:
    """One row of the table of figures."""

    name: str
    before: float
    after: float
    teacher: float | None
    better: Better
    meaning: str
    """One sentence for someone who has never heard of it."""

    @property
    def gain(self) -> float:
        """The improvement from `before` to `after` as a share of `before`; for "closer", of distances."""
        if self.better == "closer":
            whole, rest = abs(self.before - self.teacher), abs(self.after - self.teacher)
        else:
            sign = 1 if self.better == "lower" else -1
            whole, rest = sign * self.before, sign * self.after
        if not whole:
            return math.copysign(math.inf, -rest) if rest else 0.0
        return (whole - rest) / abs(whole)

    @property
    def improved(self) -> bool:
        """Whether the gain is larger than `CLEARLY`."""
        return self.gain > CLEARLY


def pixel_figures(before: Rows, after: Rows, teacher: Rows) -> list[Figure]:
    """Figures of the images of any model, measured without a network that recognises things.

    Args:
        before: teacher in one step.
        after: student in one step.
        teacher: teacher in many steps.
    """
    kinds = [_tensor(rows) for rows in (before, after, teacher)]
    figures = []
    if kinds[0].shape[1] > 1:
        figures.append(
            Figure(
                "Spread",
                *map(pixel_spread, kinds),
                "closer",
                "How different the images of one prompt are: the mean difference of their pixels, of 255, "
                f"seen at {VIEWED_AT} x {VIEWED_AT} pixels. A student whose images are all alike has lost "
                "the teacher's variety.",
            )
        )
    figures.append(
        Figure(
            "Detail",
            *(pixel_detail(kind.flatten(0, 1)) for kind in kinds),
            "closer",
            "The mean difference between neighbouring pixels, of 255: low in blurred images, high in "
            "grainy ones.",
        )
    )
    return figures


def headline(updates: int, figures: Sequence[Figure]) -> str:
    """One sentence: how long a run was, and how many of its figures are better than before."""
    done = f"Distilled with {updates:,} update{'' if updates == 1 else 's'}"
    better = sum(figure.improved for figure in figures)
    return f"{done}: {better or 'none'} of {len(figures)} figures better than before"


def read_figures(path: Path) -> list[Figure]:
    """Read the figures of an earlier report.

    Raises:
        WadiError: the file cannot be read, or is not a list of figures.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(map(_is_figure, rows)):
        names = ", ".join(field.name for field in dataclasses.fields(Figure))
        raise WadiError(f"{path}: not a list of figures, each with {names}; write it again or delete it")
    return [Figure(**row) for row in rows]


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_figure(row: Any) -> bool:
    if not isinstance(row, dict) or row.keys() != {field.name for field in dataclasses.fields(Figure)}:
        return False
    no_teacher = row["teacher"] is None and row["better"] != "closer"
    numbers = [row["before"], row["after"], 0 if no_teacher else row["teacher"]]
    texts = [row["name"], row["meaning"]]
    return (
        all(map(is_number, numbers))
        and all(isinstance(text, str) for text in texts)
        and row["better"] in get_args(Better)
    )


def _tensor(rows: Rows) -> torch.Tensor:
    """(P, n, 3, H, W) uint8."""
    arrays = np.stack([[np.asarray(image.convert("RGB")) for image in row] for row in rows])
    return torch.from_numpy(arrays).movedim(-1, 2)
