"""What is known about one layer: its figures in a comparison and in an extraction, and its place."""

from __future__ import annotations

from dataclasses import dataclass

FLOW = {
    "conv_in": -3,
    "time_embedding": -2,
    "add_embedding": -1,
    "mid_block": 1,
    "up_blocks": 2,
    "conv_out": 3,
}
"""Order in which a U-Net uses its blocks, which it registers in another order; other blocks have 0."""


def block_of(name: str) -> str:
    """Name of a layer's block, such as down_blocks.0, mid_block, transformer_blocks.5 or conv_in."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


@dataclass(frozen=True)
class Figure:
    """Mean and standard deviation over rows, and those of the null: random changes of the same sizes."""

    mean: float
    std: float
    null_mean: float
    null_std: float


@dataclass(frozen=True)
class LayerChange:
    """Figures of one weight (out, in); a row of a convolution is one output channel."""

    name: str
    block: str
    type: str
    rows: int
    columns: int
    rows_left_out: int
    """Number of rows that are zero in either weight, which have no direction."""
    changed: bool
    size: float | None
    """Root of the mean of (|w' - w| / |w|)^2 over rows; None, as the next three, if no row has a
    direction."""
    norm: Figure | None
    """| |w'| - |w| | / |w|"""
    direction: Figure | None
    """1 - cos(w, w')"""
    angle: Figure | None
    """Radians."""
    energy: tuple[float, ...] | None
    """Share of the energy of the direction residual in the first singular values, at the `RANK_SHARES` of
    `compare`; None if no direction changed."""
    null_energy: tuple[float, ...] | None
    """The same for rows of the same lengths and random directions."""


@dataclass(frozen=True)
class LayerFigures:
    """Figures of an adapted weight, W of the teacher and W' of the student; a share of zero is None."""

    name: str
    change: float
    """||W' - W||_F^2"""
    relative_change: float | None
    """||W' - W||_F / ||W||_F"""
    explained: float | None
    """Share of `change` that the adapter explains: 1 - ||W' - rotate(W, A B)||^2 / ||W' - W||^2."""
    ceiling: float | None
    """The same share for the best angle of every pair, without a limit by the rank."""
    norm_change: float | None
    """||n' - n|| / ||n|| of the row norms n: the part of `relative_change` that is length."""
