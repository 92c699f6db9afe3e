"""The charts of a report, as SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

CURVES = (("student_loss", "Student", "#2563eb"), ("fake_loss", "Fake model", "#d97706"))
FEW = 30
"""A curve of at most this many points has a marker at each."""


def loss_curves(metrics: Sequence[Mapping[str, float]]) -> str:
    """The losses of student and fake model by update, as logged and as a running average.

    Args:
        metrics: rows of metrics.jsonl. A skipped update has no losses.

    Returns:
        An ``<svg>`` element.
    """
    style = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "wadi"}
    with matplotlib.rc_context(style):
        plot = Figure(figsize=(9, 3), layout="constrained")
        for axes, (name, title, colour) in zip(plot.subplots(1, 2), CURVES, strict=True):
            rows = [row for row in metrics if math.isfinite(row.get(name, math.nan))]
            _draw(axes, [row["step"] for row in rows], [row[name] for row in rows], colour)
            axes.set_title(f"{title}: loss", loc="left", fontsize=11)
        stream = io.StringIO()
        plot.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    label = 'role="img" aria-label="Losses of the student and of the fake model by update"'
    return svg[svg.index("<svg") :].replace("<svg", f"<svg {label}", 1)


def _draw(axes: Axes, steps: Sequence[float], losses: Sequence[float], colour: str) -> None:
    axes.set_xlabel("update")
    axes.set_ylabel("loss (mean square)")
    axes.spines[["top", "right"]].set_visible(False)
    if not steps:
        axes.text(0.5, 0.5, "no loss was logged", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    marker = {"marker": "o", "markersize": 5} if len(steps) <= FEW else {}
    if len(steps) > 2:
        axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1, label="logged", **marker)
        axes.plot(steps, _smooth(losses), color=colour, linewidth=2, label="running average")
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.plot(steps, losses, color=colour, linewidth=2, **marker)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlim(0, 1.05 * steps[-1])
    if len(steps) == 1:
        axes.set_ylim(*sorted((0, 2 * losses[0] or 1)))
    axes.grid(alpha=0.2)


def _smooth(values: Sequence[float]) -> list[float]:
    """An exponential average over a tenth of the values."""
    keep = max(0.0, 1 - 10 / len(values))
    average, smooth = values[0], []
    for value in values:
        average = keep * average + (1 - keep) * value
        smooth.append(average)
    return smooth
