"""Pictures of what happened to the weights, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wadi.files import replacing_file

if TYPE_CHECKING:
    from wadi.directions.extract import LayerFigures


def save_plot(path: str | os.PathLike, layers: Sequence[LayerFigures], title: str) -> None:
    """Write a PNG: per layer, in the network's order, what is explained, the ceiling, and how far it moved.

    Args:
        path: of the picture; whole or not at all.
        layers: at least one.
        title: above the picture.
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
        with replacing_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _name_blocks(axes: Axes, names: Sequence[str]) -> None:
    """Name the first layer of every block on the axis below."""
    blocks = [".".join(name.split(".")[: 1 if name.startswith("mid_block") else 2]) for name in names]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    axes.set_xticks(starts, [blocks[i] for i in starts], rotation=60, ha="right", fontsize=8)
    axes.set_xlim(-1, len(names))
