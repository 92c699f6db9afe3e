"""What is known of one layer: how a comparison and an extraction find it, and how plots show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """Mean and standard deviation over rows, and the same of isotropic changes of the same sizes."""

    mean: float
    std: float
    null_mean: float
    null_std: float


@dataclass(frozen=True)
class LayerChange:
    """One weight with rows. A convolution's row is all of one output channel: (out, in * height * width)."""

    name: str
    block: str
    type: str
    rows: int
    columns: int
    rows_left_out: int
    """Rows that are zero in either weight: they have no direction."""
    changed: bool
    size: float | None
    """Root of the mean of (|w' - w| / |w|)^2 over rows; None, as the next three, if all rows are left out."""
    norm: Figure | None
    """| |w'| - |w| | / |w|"""
    direction: Figure | None
    """1 - cos(w, w')"""
    angle: Figure | None
    """Radians."""
    energy: tuple[float, ...] | None
    """Running share of energy of the direction residual, at `RANK_SHARES` of `compare`; None if no direction
    changed."""
    null_energy: tuple[float, ...] | None
    """The same for rows of the same lengths in random directions."""


@dataclass(frozen=True)
class LayerFigures:
    """One adapted weight W (out, in) of the teacher, W' of the student. A share of nothing is ``None``."""

    name: str
    change: float
    """||W' - W||_F^2"""
    relative_change: float | None
    """||W' - W||_F / ||W||_F"""
    explained: float | None
    """Share of `change` that the adapter explains: 1 - ||W' - rotate(W, A B)||^2 / ||W' - W||^2."""
    ceiling: float | None
    """The same for the best angle of every pair, which no rank restricts."""
    norm_change: float | None
    """||n' - n|| / ||n|| of the row norms: what of `relative_change` is length."""
