"""The mathematics of comparison: how far rows of weights moved in length and in direction, and the null.

A row w of a teacher's weight W (out, n) holds the weights of one output; w' is the student's row, and d = w'
- w. A row has three figures (arXiv 2603.08258 splits weights in this way, as DoRA, arXiv 2402.09353, does):

    norm change         | |w'| - |w| | / |w|
    direction change    1 - cos(w, w')  =  |w' / |w'| - w / |w||^2 / 2        (the right side does not cancel)
    angle               2 asin(|w' / |w'| - w / |w|| / 2), radians

**The null** of a figure is its expectation if d keeps its length and has a random direction. With
rho = |d| / |w|, everything follows from t, the cosine between d and w:

    |w'| / |w| = sqrt(1 + 2 rho t + rho^2) = q        cos(w, w') = (1 + rho t) / q

and for d uniform on a sphere of n dimensions t = cos(phi) has the density sin(phi)^(n - 2) on [0, pi]
(Muirhead 1982, Aspects of Multivariate Statistical Theory, section 1.5). Its width is about 1 / sqrt(n): in
many dimensions nearly every change is a change of direction, whatever its cause. For small rho, E[norm
change] = rho sqrt(2 / (pi n)), E[angle] = rho and E[1 - cos] = rho^2 / 2 (to 1 / n).

**The spectrum** is that of the direction residual R, whose rows are w' / |w'| - w / |w|. The squared singular
values are called energies. The share of the first k of them says how much of R a matrix of rank k can hold
(Eckart and Young). They are computed as the eigenvalues of the smaller of R R^T and R^T R, which is far
cheaper than an SVD; the error is the rounding of the largest one. The null has rows of the same lengths and
random directions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

_CHUNK = 2**21
"""Number of elements that are held in float64 at a time."""
_NODES, _REACH = 32, 9.0
"""Number of Gauss-Legendre nodes on each side of the kink, and of widths 1 / sqrt(n) that are integrated."""
_NULL_SIDE = 256
"""Largest smaller side of the random matrix of which the null's spectrum is computed."""


class RowChanges(NamedTuple):
    """Figures of the rows that have a direction in both weights; float64 vectors of one length."""

    norm: torch.Tensor
    """| |w'| - |w| | / |w|"""
    direction: torch.Tensor
    """1 - cos(w, w')"""
    angle: torch.Tensor
    """radians"""
    size: torch.Tensor
    """|w' - w| / |w|"""


class Moments(NamedTuple):
    """Mean and standard deviation over rows; the rows are the whole population, not a sample."""

    mean: float
    std: float


def moments(values: torch.Tensor) -> Moments:
    """The mean and standard deviation of a vector that is not empty."""
    return Moments(values.mean().item(), values.std(correction=0).item())


def row_changes(weight: torch.Tensor, target: torch.Tensor) -> tuple[RowChanges, torch.Tensor]:
    """Compare two weights row by row, in float64.

    Rows that are zero in either weight have no direction; they have no figures, and are zero in R.

    Args:
        weight: W (out, n), any floating dtype.
        target: W' (out, n).

    Returns:
        The figures of the rows, and the direction residual R (out, n) in float32.
    """
    residual = torch.empty(weight.shape, dtype=torch.float32)
    parts, chunk = [], max(1, _CHUNK // max(1, weight.shape[1]))
    for w, w2, r in zip(weight.split(chunk), target.split(chunk), residual.split(chunk), strict=True):
        w, w2 = w.double(), w2.double()
        n, n2 = w.norm(dim=1), w2.norm(dim=1)
        size = (w2 - w).norm(dim=1)
        kept = (n != 0) & (n2 != 0)  # rows that are not finite are kept, so that they are noticed
        turned = (w2 / n2[:, None]).sub_(w / n[:, None])
        chord = turned.norm(dim=1)
        r.copy_(turned.masked_fill_(~kept[:, None], 0))
        parts.append(torch.stack([(n2 - n).abs() / n, chord**2 / 2, chord, size / n])[:, kept])
    norm, direction, chord, size = torch.cat(parts, dim=1)
    return RowChanges(norm, direction, 2 * (chord / 2).clamp(max=1).asin(), size), residual


def null_moments(size: torch.Tensor, n: int) -> dict[str, Moments]:
    """Compute the moments of the three figures for random changes of the same sizes, by quadrature.

    The relative error of the quadrature is below 1e-6. The integral over phi is split where |w'| = |w|, at
    cos(phi) = -rho / 2, so that both parts are smooth.

    Args:
        size: rho, (rows,) float64, at least one row.
        n: length of a row, at least 1. With 1 the change is +rho or -rho.

    Returns:
        `Moments` over rows and over changes, by name of the field of `RowChanges`.
    """
    rho = size[:, None]
    if n == 1:
        cosine = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
        sine, mass = torch.zeros_like(cosine), torch.full_like(cosine, 0.5)
    else:
        phi, mass = _quadrature(rho, n)
        cosine, sine = phi.cos(), phi.sin()
    along, across = 1 + rho * cosine, rho * sine
    q = torch.hypot(along, across)
    angle = torch.atan2(across, along)
    # q - 1 without cancellation; 1 - cos x = 2 sin^2(x / 2)
    norm = ((2 * rho * cosine + rho**2) / (q + 1)).abs()
    figures = {"norm": norm, "direction": 2 * (angle / 2).sin() ** 2, "angle": angle}
    return {name: _weighted_moments(values, mass) for name, values in figures.items()}


def energies(residual: torch.Tensor) -> torch.Tensor:
    """Compute the squared singular values of R, the largest first.

    Args:
        residual: R (out, n), float32 or float64; the Gram matrix and its eigenvalues are computed in it.

    Returns:
        (min(out, n),) float64, none negative.
    """
    # without this scale, squares of small float32 numbers would underflow
    largest = residual.abs().max()
    if largest == 0:
        return torch.zeros(min(residual.shape), dtype=torch.float64)
    scaled = residual / largest
    gram = scaled @ scaled.T if len(scaled) <= scaled.shape[1] else scaled.T @ scaled
    return torch.linalg.eigvalsh(gram).double().clamp(min=0).flip(0) * largest.double() ** 2


def null_energies(lengths: torch.Tensor, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Draw a matrix whose rows have given lengths and random directions; return its squared singular values.

    For a large matrix, a smaller one with the same aspect ratio is drawn, whose smaller side is 256 and whose
    rows have the quantiles of the lengths. For large matrices the share of energy at a share of rank depends
    on these two alone (Silverstein and Bai 1995, on sample covariance matrices).

    Args:
        lengths: (rows,) float64, lengths of the rows of R.
        shape: (rows, n), shape of R.
        seed: seed of the draw.

    Returns:
        (at most 256,) float64, the largest first.
    """
    scale = min(1.0, _NULL_SIDE / min(shape))
    rows, n = (max(1, round(side * scale)) for side in shape)
    places = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    drawn = torch.randn(rows, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    kept = lengths if rows == len(lengths) else lengths.quantile(places)
    return energies(drawn / drawn.norm(dim=1, keepdim=True) * kept[:, None])


def energy_shares(energy: torch.Tensor, rank_shares: torch.Tensor) -> torch.Tensor | None:
    """The share of all energy in the first singular values, at shares of full rank; None if all are zero.

    Args:
        energy: (full rank,) float64, the largest first.
        rank_shares: values in [0, 1]; between whole ranks the share is interpolated linearly.

    Returns:
        Shares, of the shape of `rank_shares`.
    """
    total = energy.sum()
    if total == 0:
        return None
    running = torch.cat([energy.new_zeros(1), energy.cumsum(0)]) / total
    rank = rank_shares.double() * len(energy)
    below = rank.floor().long().clamp(max=len(energy) - 1)
    return running[below] + (rank - below) * (running[below + 1] - running[below])


def with_norms_of(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Give the rows of `weight` the lengths of the rows of `norms`; a row that is zero in either stays.

    Args:
        weight: (out, ...), any floating dtype.
        norms: the same shape.

    Returns:
        The shape and dtype of `weight`; computed in float64.
    """
    rows, others = weight.flatten(1).double(), norms.flatten(1).double()
    have, want = rows.norm(dim=1), others.norm(dim=1)
    factor = torch.where((have != 0) & (want != 0), want / have, 1.0)
    return (rows * factor[:, None]).to(weight.dtype).view_as(weight)


def _quadrature(rho: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes phi (rows, 2 * _NODES) and their masses, which sum to 1 in each row."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(_NODES))
    low = max(0.0, np.pi / 2 - _REACH / n**0.5)
    high = np.pi - low
    kink = (-rho / 2).clamp(-1, 1).acos().clamp(low, high)
    parts = []
    for start, end in ((torch.full_like(kink, low), kink), (kink, torch.full_like(kink, high))):
        half = (end - start) / 2
        phi = start + half * (nodes + 1)
        parts.append((phi, half * weights * phi.sin() ** (n - 2)))
    phi, mass = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
    return phi, mass / mass.sum(dim=1, keepdim=True)


def _weighted_moments(values: torch.Tensor, mass: torch.Tensor) -> Moments:
    mean = (values * mass).sum(dim=1).mean()
    variance = ((values - mean) ** 2 * mass).sum(dim=1).mean()
    return Moments(mean.item(), variance.sqrt().item())
