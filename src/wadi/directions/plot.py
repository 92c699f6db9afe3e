"""Plots of how weights changed, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wadi.directions.figures import LayerChange, LayerFigures, block_of
from wadi.files import replacing_file

_BLUE, _RED = "#2563eb", "#dc2626"
_KINDS = {"direction": (_BLUE, "direction change 1 - cos"), "norm": (_RED, "relative norm change")}


def save_plot(path: str | os.PathLike, layers: Sequence[LayerFigures], title: str) -> None:
    """Plot for each layer the explained share of its change, the ceiling, and how far it moved.

    Args:
        path: PNG file to write, whole or not at all.
        layers: at least one layer, in the network's order.
        title: title of the plot.
    """
    places = range(len(layers))

    def values(field: str) -> list[float]:
        found = (getattr(layer, field) for layer in layers)
        return [math.nan if value is None else value for value in found]

    width = max(7.0, min(16.0, 0.12 * len(layers)))
    with _plot(path, (width, 6.2), 2) as (shares, moves):
        shares.bar(places, values("explained"), width=0.9, color=_BLUE, label="explained by the adapter")
        shares.plot(places, values("ceiling"), ".", color="#d97706", label="ceiling: any rotation")
        shares.set_ylim(min(0.0, *shares.get_ylim()), 1.04)
        shares.set_ylabel("share of ||W' - W||²")
        moves.plot(places, values("relative_change"), ".", color=_BLUE, label="||W' - W|| / ||W||")
        moves.plot(places, values("norm_change"), ".", color=_RED, label="row norms: ||n' - n|| / ||n||")
        moves.set_ylim(bottom=0)
        moves.set_ylabel("relative change")
        for axes in (shares, moves):
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        blocks = [block_of(layer.name) for layer in layers]
        starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
        moves.set_xticks(starts, [blocks[i] for i in starts], rotation=60, ha="right", fontsize=8)
        moves.set_xlim(-1, len(layers))
        shares.set_title(title, loc="left", fontsize=11)


def save_scatter(path: str | os.PathLike, layers: Sequence[LayerChange]) -> None:
    """Plot the standard deviation of each layer against its mean, as the left half of the paper's Figure 1.

    The nulls are hollow. The axes are logarithmic, so values that are exactly zero are not drawn.

    Args:
        path: PNG file to write, whole or not at all.
        layers: the layers; those that did not change are not drawn.
    """
    with _plot(path, (6.4, 5.2)) as (axes,):
        for field, (colour, label) in _KINDS.items():
            found = [change for layer in layers if layer.changed and (change := getattr(layer, field))]
            null = [(change.null_mean, change.null_std) for change in found]
            axes.plot(*_columns((f.mean, f.std) for f in found), ".", color=colour, label=label)
            style = {"marker": "o", "markersize": 4, "linestyle": "", "fillstyle": "none", "alpha": 0.6}
            axes.plot(*_columns(null), color=colour, label="  null: isotropic, same size", **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("mean over the rows of a layer")
        axes.set_ylabel("standard deviation over the rows")
        axes.legend(frameon=False)


def save_spectrum(
    path: str | os.PathLike, layers: Sequence[LayerChange], rank_shares: Sequence[float], quoted: float
) -> None:
    """Plot the share of energy against the rank, as the right half of the paper's Figure 1.

    The line is the mean over layers, and the band holds nine layers of ten.

    Args:
        path: PNG file to write, whole or not at all.
        layers: the layers; those whose directions did not change are not in it.
        rank_shares: shares of full rank at which the curves of the layers are known.
        quoted: one of these shares, at which the figures are written out.
    """
    with _plot(path, (6.4, 5.2)) as (axes,):
        place = min(range(len(rank_shares)), key=lambda i: abs(rank_shares[i] - quoted))
        for field, colour, label in (
            ("energy", _BLUE, "direction residual"),
            ("null_energy", "#6b7280", "null: same lengths, random directions"),
        ):
            curves = np.array([curve for layer in layers if (curve := getattr(layer, field)) is not None])
            low, high = np.quantile(curves, (0.05, 0.95), axis=0)
            mean = curves.mean(axis=0)
            axes.fill_between(rank_shares, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(rank_shares, mean, color=colour, label=f"{label}: {mean[place]:.1%} at {quoted:.0%}")
        axes.axvline(quoted, color="black", linewidth=0.6, linestyle=":")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("share of full rank")
        axes.set_ylabel("share of energy (squared singular values)")
        axes.legend(frameon=False, loc="lower right")


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """x and y of the points that logarithmic axes can show, which are positive."""
    shown = [(x, y) for x, y in points if x > 0 and y > 0]
    return [x for x, _ in shown], [y for _, y in shown]


@contextmanager
def _plot(path: str | os.PathLike, size: tuple[float, float], rows: int = 1) -> Iterator[Sequence[Axes]]:
    """Yield the axes of a new figure, one below the other, and write the figure after the block."""
    with matplotlib.rc_context({"font.family": "sans-serif"}):
        figure = Figure(figsize=size, layout="constrained")
        plots = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for axes in plots:
            axes.spines[["top", "right"]].set_visible(False)
        yield plots
        with replacing_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
