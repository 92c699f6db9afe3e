"""Plots of docs/evidence.md; `experiments/evidence.py` calls them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from wadi.files import replacing_file

if TYPE_CHECKING:
    from evidence import Group

# Okabe and Ito's colours, told apart by all eyes; shapes tell the same again
STYLES = {
    "lorad": ("#0072b2", "o"),
    "lora": ("#d55e00", "s"),
    "dora": ("#009e73", "^"),
    "oft": ("#cc79a7", "D"),
    "full": ("#4b5563", "v"),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#4b5563", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")
SHAPES = ("o", "s", "^", "D", "v", "P")
LABELS = {
    "frechet_distance": "Fréchet distance",
    "alignment": "alignment, share right",
    "background_entropy": "free background, bits",
}
UNIFORM = math.log2(10)
"""Entropy of ten backgrounds that are equally likely, as they are in the data."""
WIDTH = 7.5
"""Inches: 900 pixels."""


def save_rates(path: Path, groups: Sequence[Group], chosen: Mapping[str, float]) -> None:
    """Write a PNG: figures against learning rate, a line per method; crosses are runs that diverged.

    Args:
        path: of the picture; whole or not at all.
        groups: one for each method and learning rate.
        chosen: the learning rate of each method that has a ring.
    """
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
        panels = dict(zip(("frechet_distance", "alignment"), figure.subplots(1, 2), strict=True))
        for i, (label, members) in enumerate(_by_label(groups).items()):
            colour, shape = _style(members[0])
            lost = [g.first.rate for g in members if len(g.finished) < len(g.runs)]
            for name, axes in panels.items():
                points = [(g.first.rate, statistics.fmean(v)) for g in members if (v := g.values(name))]
                axes.plot(*_columns(points), color=colour, marker=shape, markersize=5, label=label)
                ring = {"markersize": 11, "linestyle": "", "fillstyle": "none", "color": colour}
                axes.plot(*_columns(p for p in points if p[0] == chosen[label]), "o", **ring)
                # at the bad end of the panel, one method beside another
                height = 0.98 - 0.03 * i if name == "frechet_distance" else 0.02 + 0.03 * i
                where = axes.get_xaxis_transform()
                (cross,) = axes.plot(lost, [height] * len(lost), "x", color=colour, mew=2, transform=where)
                cross.set_in_layout(False)
        for name, axes in panels.items():
            axes.set_xscale("log")
            axes.set_xlabel("learning rate of the student")
            _finish(axes, name)
        _log_axis(panels["frechet_distance"].yaxis)
        lost = any(len(group.finished) < len(group.runs) for group in groups)
        title = f"ring: chosen{'; cross: not finite' if lost else ''}"
        _legend(figure, panels["frechet_distance"], title)
        _save(figure, path)


def save_curves(path: Path, groups: Sequence[Group]) -> None:
    """Write a PNG: figures on the way of the training, means over seeds in a band from lowest to highest.

    Runs that diverged are in no mean; the legend counts them.

    Args:
        path: of the picture; whole or not at all.
        groups: one for each method.
    """
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        panels = dict(zip(LABELS, figure.subplots(1, 3), strict=True))
        for group in groups:
            colour, shape = _style(group)
            of_all = len(group.finished), len(group.runs)
            label = (
                group.label if of_all[0] == of_all[1] else f"{group.label} ({of_all[0]} of {of_all[1]} seeds)"
            )
            for name, axes in panels.items():
                points = _curve(group, name)
                steps = [step for step, _ in points]
                axes.fill_between(
                    steps,
                    [min(v) for _, v in points],
                    [max(v) for _, v in points],
                    color=colour,
                    alpha=0.15,
                    lw=0,
                )
                means = [statistics.fmean(values) for _, values in points]
                axes.plot(
                    steps, means, color=colour, marker=shape, markersize=3.5, linewidth=1.2, label=label
                )
        for name, axes in panels.items():
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_xlabel("updates of the student")
            _finish(axes, name)
        _log_axis(panels["frechet_distance"].yaxis)
        _legend(figure, panels["frechet_distance"])
        _save(figure, path)


def _curve(group: Group, name: str) -> list[tuple[int, list[float]]]:
    """(update, values of the finished runs) where all of them were judged by as many pictures."""
    rows: dict[tuple[int, int], list[Any]] = {}
    for run in group.finished:
        for point in run.curve:
            rows.setdefault((point["samples"], point["step"]), []).append(point.get(name))
    if not rows:
        return []
    # Frechet distances of more pictures are lower: the end, judged by all, is no point of this curve
    usual = statistics.mode(samples for samples, _ in rows)
    return [
        (step, values)
        for (samples, step), values in sorted(rows.items())
        if samples == usual and len(values) == len(group.finished) and None not in values
    ]


def save_methods(path: Path, groups: Sequence[Group]) -> None:
    """Write a PNG: every seed of every method a dot, beside the mean and its interval.

    Args:
        path: of the picture; whole or not at all.
        groups: one for each method.
    """
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(WIDTH, 1.1 + 0.45 * len(groups)), layout="constrained")
        panels = dict(zip(LABELS, figure.subplots(1, 3, sharey=True), strict=True))
        for name, axes in panels.items():
            for row, group in enumerate(groups):
                colour, shape = _style(group)
                values, found = group.values(name), group.estimate(name)
                axes.plot(
                    values, [row + 0.17] * len(values), shape, color=colour, markersize=4, alpha=0.55, mew=0
                )
                if found is not None:
                    bar = {"color": colour, "capsize": 3, "markersize": 6, "marker": "|", "linewidth": 1.4}
                    axes.errorbar(found.mean, row - 0.17, xerr=found.half, **bar)
            shown = [value for group in groups for value in group.values(name)]
            if name == "frechet_distance" and shown and max(shown) > 4 * min(shown):
                _log_axis(axes.xaxis)
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4, prune="lower"))
            axes.set_xlabel(LABELS[name])
            axes.grid(axis="x", color="#e5e7eb", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        first = panels["frechet_distance"]
        first.set_yticks(range(len(groups)), [_counted(group) for group in groups])
        first.set_ylim(len(groups) - 0.5, -0.5)
        _save(figure, path)


def _counted(group: Group) -> str:
    of_all = len(group.finished), len(group.runs)
    return group.label if of_all[0] == of_all[1] else f"{group.label}\n({of_all[0]} of {of_all[1]} finite)"


def save_ranks(path: Path, groups: Sequence[Group]) -> None:
    """Write a PNG: figures against the share of parameters that is trained; bars from lowest to highest seed.

    Args:
        path: of the picture; whole or not at all.
        groups: one for each method and rank.
    """
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        panels = dict(zip(("frechet_distance", "alignment"), figure.subplots(1, 2), strict=True))
        for name, axes in panels.items():
            for label, members in _by_label(groups).items():
                colour, shape = _style(members[0])
                points = [(100 * g.first.share, v) for g in members if (v := g.values(name))]
                means = [statistics.fmean(v) for _, v in points]
                ends = (
                    [mean - min(v) for mean, (_, v) in zip(means, points, strict=True)],
                    [max(v) - mean for mean, (_, v) in zip(means, points, strict=True)],
                )
                style = {"color": colour, "marker": shape, "markersize": 5, "capsize": 3, "label": label}
                axes.errorbar([x for x, _ in points], means, yerr=ends, **style)
            _log_axis(axes.xaxis)
            axes.set_xlabel("trained, % of the network's parameters")
            _finish(axes, name)
        _log_axis(panels["frechet_distance"].yaxis)
        _legend(figure, panels["frechet_distance"])
        _save(figure, path)


def save_fake(path: Path, groups: Sequence[Group]) -> None:
    """Write a PNG: variety against Frechet distance, a line per fake model, a shape per number of updates.

    Args:
        path: of the picture; whole or not at all.
        groups: one for each fake model and number of updates.
    """
    models: dict[str, list[Group]] = {}
    for group in groups:
        models.setdefault(re.sub(r",? *\d+ updates?$", "", group.label), []).append(group)
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
        axes = figure.subplots()
        updates = sorted({group.first.config["fake_updates"] for group in groups})
        for i, (label, members) in enumerate(models.items()):
            line = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.1, "label": label}
            points = [(_mean(g, "frechet_distance"), _mean(g, "background_entropy"), g) for g in members]
            shown = [point for point in points if None not in point[:2]]
            axes.plot(*_columns(point[:2] for point in shown), DASHES[i % len(DASHES)], **line)
            for x, y, group in shown:
                shape = SHAPES[updates.index(group.first.config["fake_updates"]) % len(SHAPES)]
                axes.plot(x, y, shape, color=line["color"], markersize=7, mec="white", mew=0.7)
        for number, shape in zip(updates, SHAPES, strict=False):
            plural = "s" if number > 1 else ""
            axes.plot([], [], shape, color="#9ca3af", markersize=7, label=f"{number} update{plural}")
        axes.axhline(UNIFORM, color="black", linewidth=0.6, linestyle=":")
        beside = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "fontsize": 8}
        axes.annotate("uniform, as in the data", (1, UNIFORM), (0, 3), ha="right", **beside)
        axes.set_xlabel("Fréchet distance")
        _log_axis(axes.xaxis)
        _finish(axes, "background_entropy")
        lost = [group.label for group in groups if not group.finished]
        _legend(figure, axes, f"not finite: {'; '.join(lost)}" if lost else None)
        _save(figure, path)


def _mean(group: Group, name: str) -> float | None:
    values = group.values(name)
    return statistics.fmean(values) if values else None


def _by_label(groups: Sequence[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.label, []).append(group)
    return found


def _style(group: Group) -> tuple[str, str]:
    return STYLES.get(group.first.config["student_method"], ("#e69f00", "P"))


def _columns(points: Any) -> tuple[list[float], list[float]]:
    shown = list(points)
    return [x for x, _ in shown], [y for _, y in shown]


def _finish(axes: Axes, name: str) -> None:
    axes.set_ylabel(LABELS[name])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)


def _log_axis(axis: Axis) -> None:
    """Logarithmic, with plain numbers, enough of them within a decade."""
    axes = axis.axes
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)
    if high < 2 * low:
        subs = tuple(i / 10 for i in range(10, 100, 1 if high < 1.3 * low else 2))
    axis.set_major_locator(LogLocator(10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes, title: str | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if len(labels) <= 5 else math.ceil(len(labels) / math.ceil(len(labels) / 4))
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        title=title,
        title_fontsize=9,
    )
    legend.get_title().set_multialignment("center")


def _save(figure: Figure, path: Path) -> None:
    figure.get_layout_engine().set(w_pad=0.08, wspace=0.03)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
