"""The mathematics of extraction: the angles, and their best factors, that turn one weight into another.

The columns ``2i`` and ``2i + 1`` of a weight W (out, in) are read as complex numbers w = o + i e, and those
of the target weight W' as w' = o' + i e' (`wadi.lorad.rotation`). For one pair and any angle theta

    |w' - w exp(i theta)|^2 = |w|^2 + |w'|^2 - 2 Re(w' conj(w) exp(-i theta))
                            = (|w'| - |w|)^2 + 2 |w| |w'| (1 - cos(theta - phi))

with phi = arg(w' conj(w)) = atan2(o e' - e o', o o' + e e'). Only the last term depends on theta, it is never
negative, and it is zero exactly where theta = phi (mod 2 pi): phi is the least-squares optimum of the pair.
The remaining (|w'| - |w|)^2 is the change of the pair's norm, which no rotation can make. If W' - W has
random directions and is small compared with the pair, this is half of the change: one of its two directions
is radial.

The best adapter of rank r therefore minimises, with p = |w| |w'|,

    f(A, B) = 2 sum p (1 - cos(A B - phi))        over A (out, r), B (r, in // 2)

The plain SVD of phi is the start. It ignores the weights p, so that the angles of small pairs, which are
mostly noise, count as much as others; and it ignores that phi is known only up to 2 pi. With d = A B - phi
wrapped into [-pi, pi], the bound

    1 - cos x <= 1 - cos d + (sin d / d) (x^2 - d^2) / 2        for all x, equal at x = d

(the sharpest quadratic one: de Leeuw and Lange, "Sharp quadratic majorization in one dimension", 2009; with
c = sin d / d, 1 - cos x - c x^2 / 2 rises up to |d|, falls up to pi, and is not above its value there beyond)
makes f a weighted least-squares problem in A if B is fixed, and in B if A is fixed. The rows are then
independent, and no step can increase f. If the angle of a pair is beyond pi, the pair changes to that branch
as soon as A B is nearer to it.
"""

from __future__ import annotations

import math

import torch

from wadi.lorad.rotation import Factors, rotate

_CHUNK = 2**24
"""Number of elements of the largest temporary tensor in a sweep."""


def best_angles(weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the angles that turn every pair of `weight` as near to `target` as any rotation can.

    ``phi = atan2(o e' - e o', o o' + e e')``; the proof is at the top of this module. If a pair of either
    weight is zero, all angles are equally good, and 0 is returned.

    Args:
        weight: W (out, in), any floating dtype.
        target: W' (out, in).

    Returns:
        (out, in // 2), radians in [-pi, pi], float32 or wider.
    """
    (o, e), (o2, e2) = _pairs(weight), _pairs(target)
    return torch.atan2(o * e2 - e * o2, o * o2 + e * e2)


def best_factors(
    weight: torch.Tensor, target: torch.Tensor, r: int, max_sweeps: int = 10, tolerance: float = 1e-3
) -> Factors:
    """Return the A and B of a local minimum of ||W' - rotate(W, A B)||, the distance to `target`.

    The result is never farther from `target` than `weight` itself. Sweeps (first A, then B) end when a sweep
    reduces the squared distance by less than `tolerance` of ``||W' - W||^2``, or when less than that can be
    explained. A sweep costs about ``out * in * r^2`` multiplications.

    Args:
        weight: W (out, in), any floating dtype.
        target: W' (out, in).
        r: rank. From ``min(out, in // 2)`` on the angles are exact, and the rest of A and B is zero.
        max_sweeps: most sweeps; with 0 the plain SVD of the angles is returned, or A = 0 if that is nearer.
        tolerance: share of the squared change.

    Returns:
        A (out, r) and B (r, in // 2), float32 or wider, balanced: ``A^T A = B B^T`` is diagonal.
    """
    phi = best_angles(weight, target)
    A, B = _svd_factors(phi, r)
    if r >= min(phi.shape):
        return Factors(A, B)
    (o, e), (o2, e2) = _pairs(weight), _pairs(target)
    p = torch.hypot(o, e) * torch.hypot(o2, e2)
    change = squared_distance(target, weight)
    error = _turned_error(phi, p, A, B)
    if error > _turned_error(phi, p, torch.zeros_like(A), B):
        A = torch.zeros_like(A)
        error = _turned_error(phi, p, A, B)
    for _ in range(max_sweeps):
        if error < tolerance * change:
            break
        A = _half_sweep(phi, p, A, B)
        B = _half_sweep(phi.T, p.T, B.T, A.T).T
        before, error = error, _turned_error(phi, p, A, B)
        if before - error < tolerance * change:
            break
    return _balanced(A, B)


def squared_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return ``||a - b||_F^2``, summed in float64."""
    return (a.double() - b.double()).square().sum().item()


def norm_change(weight: torch.Tensor, target: torch.Tensor) -> float | None:
    """Return ``||n' - n|| / ||n||`` for the vectors n, n' (out,) of row norms; None if W is zero."""
    n, n2 = (w.double().norm(dim=1) for w in (weight, target))
    return ((n2 - n).norm() / n.norm()).item() if n.any() else None


def explained_share(weight: torch.Tensor, target: torch.Tensor, theta: torch.Tensor) -> float | None:
    """Return ``1 - ||W' - rotate(W, theta)||^2 / ||W' - W||^2``; None if W' = W.

    Args:
        weight: W (out, in), any floating dtype.
        target: W' (out, in).
        theta: (out, in // 2), radians. With `best_angles` the share is the ceiling for all adapters.
    """
    change = squared_distance(target, weight)
    return 1 - squared_distance(target, rotate(weight, theta)) / change if change else None


def _pairs(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Even and odd columns, float32 or wider; the last column of an odd number has no partner."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    paired = weight.shape[1] // 2 * 2
    return wide[:, 0:paired:2], wide[:, 1:paired:2]


def _svd_factors(theta: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced factors of the best approximation of rank `r` (Eckart and Young), padded with zeros."""
    U, S, Vh = torch.linalg.svd(theta, full_matrices=False)
    kept, root = min(r, len(S)), S[:r].sqrt()
    A, B = theta.new_zeros(len(theta), r), theta.new_zeros(r, theta.shape[1])
    A[:, :kept], B[:kept] = U[:, :r] * root, root[:, None] * Vh[:r]
    return A, B


def _balanced(A: torch.Tensor, B: torch.Tensor) -> Factors:
    """Balance the factors of a product, by QR of both and SVD of the (r, r) core."""
    (Q, R), (Q2, R2) = torch.linalg.qr(A), torch.linalg.qr(B.T)
    left, right = _svd_factors(R @ R2.T, A.shape[1])
    return Factors(Q @ left, right @ Q2.T)


def _turned_error(phi: torch.Tensor, p: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> float:
    """Return f(A, B), which is ||W' - rotate(W, A B)||^2 without the change of norms."""
    # 1 - cos d = 2 sin^2(d / 2), without cancellation
    return 4 * (p * ((A @ B - phi) / 2).sin().square()).sum(dtype=torch.float64).item()


def _half_sweep(phi: torch.Tensor, p: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return the A that minimises the quadratic bound of f for a fixed B; each row is an (r, r) system.

    The step of a row a is ``(B diag(p sin(d) / d) B^T + ridge)^-1 B (-p sin d)``. If the system is singular,
    the ridge keeps the step small, so that f still does not increase.
    """
    r, columns = B.shape
    rows = max(1, _CHUNK // (r * max(r, columns)))
    identity = torch.eye(r, dtype=B.dtype, device=B.device)
    parts = []
    for a, phi_rows, p_rows in zip(A.split(rows), phi.split(rows), p.split(rows), strict=True):
        d = torch.remainder(a @ B - phi_rows + math.pi, 2 * math.pi) - math.pi
        curvature = (p_rows * torch.sinc(d / math.pi)).clamp_min_(0)
        gram = (curvature[:, None, :] * B) @ B.T
        ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(B.dtype).tiny * 1e12)
        descent = -(p_rows * d.sin()) @ B.T
        step = torch.linalg.solve(gram + ridge[:, None, None] * identity, descent[:, :, None])
        parts.append(a + step[:, :, 0])
    return torch.cat(parts)
