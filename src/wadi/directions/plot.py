"""Images of what happened to the weights, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wadi.directions.figures import LayerChange, LayerFigures
from wadi.files import replacing_file

_KINDS = {"direction": ("#2563eb", "direction change 1 - cos"), "norm": ("#dc2626", "relative norm change")}


def save_plot(path: str | os.PathLike, layers: Sequence[LayerFigures], title: str) -> None:
    """Write a PNG: per layer, in the network's order, what is explained, the ceiling, and how far it moved.

    Args:
        path: of the image; whole or not at all.
        layers: at least one.
        title: above the image.
    """
    places = range(len(layers))

    def values(field: str) -> list[float]:
        found = (getattr(layer, field) for layer in layers)
        return [math.nan if value is None else value for value in found]

    with matplotlib.rc_context({"font.family": "sans-serif"}):
        figure = Figure(figsize=(max(7.0, min(16.0, 0.12 * len(layers))), 6.2), layout="constrained")
        shares, moves = figure.subplots(2, 1, sharex=True)
        shares.bar(places, values("explained"), width=0.9, color="#2563eb", label="explained by the adapter")
        shares.plot(places, values("ceiling"), ".", color="#d97706", label="ceiling: any rotation")
        shares.set_ylim(min(0.0, *shares.get_ylim()), 1.04)
        shares.set_ylabel("share of ||W' - W||²")
        moves.plot(places, values("relative_change"), ".", color="#2563eb", label="||W' - W|| / ||W||")
        moves.plot(places, values("norm_change"), ".", color="#dc2626", label="row norms: ||n' - n|| / ||n||")
        moves.set_ylim(bottom=0)
        moves.set_ylabel("relative change")
        for axes in (shares, moves):
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
        _name_blocks(moves, [layer.name for layer in layers])
        shares.set_title(title, loc="left", fontsize=11)
        _save(figure, path)


def _name_blocks(axes: Axes, names: Sequence[str]) -> None:
    """Name the first layer of every block on the axis below."""
    blocks = [".".join(name.split(".")[: 1 if name.startswith("mid_block") else 2]) for name in names]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    axes.set_xticks(starts, [blocks[i] for i in starts], rotation=60, ha="right", fontsize=8)
    axes.set_xlim(-1, len(names))


def save_scatter(path: str | os.PathLike, layers: Sequence[LayerChange]) -> None:
    """Write a PNG, the left half of the paper's Figure 1: a point per layer, standard deviation against mean.

    Both kinds of change, and hollow their nulls. Axes are logarithmic; what is exactly zero is not drawn.

    Args:
        path: of the image; whole or not at all.
        layers: those that did not change are left out.
    """
    with matplotlib.rc_context({"font.family": "sans-serif"}):
        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        axes = figure.subplots()
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
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        _save(figure, path)


def save_spectrum(
    path: str | os.PathLike, layers: Sequence[LayerChange], rank_shares: Sequence[float], quoted: float
) -> None:
    """Write a PNG, the right half of the paper's Figure 1: running share of energy against rank.

    The line is the mean over layers, the band holds nine layers of ten.

    Args:
        path: of the image; whole or not at all.
        layers: those whose directions did not change are left out.
        rank_shares: shares of full rank at which the layers' curves are known.
        quoted: the one of them whose figures are written out.
    """
    with matplotlib.rc_context({"font.family": "sans-serif"}):
        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        axes = figure.subplots()
        place = min(range(len(rank_shares)), key=lambda i: abs(rank_shares[i] - quoted))
        for field, colour, label in (
            ("energy", "#2563eb", "direction residual"),
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
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
        _save(figure, path)


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """x and y of the points that logarithmic axes can show."""
    shown = [(x, y) for x, y in points if x > 0 and y > 0]
    return [x for x, _ in shown], [y for _, y in shown]


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
