"""The best angles against brute force, the fit against autograd, an isotropic change against theory."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wadi.directions import best_angles, best_factors, explained_share, norm_change
from wadi.lorad.rotation import angles, rotate

shapes = st.tuples(st.integers(1, 6), st.integers(2, 9))
seeds = st.integers(0, 2**31 - 1)


def normal(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def distance(weight, target, theta):
    return (target - rotate(weight, theta)).square().sum()


@given(shapes, seeds, st.floats(0.01, 10))
def test_best_angles_are_those_of_brute_force(shape, seed, size):
    weight, target = normal(seed, shape, shape)
    target = size * target
    found = best_angles(weight, target)
    grid = torch.linspace(-math.pi, math.pi, 2001, dtype=torch.float64)
    for row in range(shape[0]):
        for i in range(shape[1] // 2):
            pair = slice(2 * i, 2 * i + 2)
            (o, e), reach = weight[row, pair], target[row, pair]
            turned = torch.stack([o * grid.cos() - e * grid.sin(), o * grid.sin() + e * grid.cos()])
            errors = (reach[:, None] - turned).square().sum(0)
            ours = distance(weight[row : row + 1, pair], reach[None], found[row, i].view(1, 1))
            assert ours <= errors.min() + 1e-12 * reach.square().sum()
            apart = (found[row, i] - grid[errors.argmin()] + math.pi) % (2 * math.pi) - math.pi
            assert abs(apart) <= grid[1] - grid[0]


@given(shapes, seeds, st.floats(0.01, 3))
def test_best_angles_find_the_rotation_and_leave_only_norms(shape, seed, size):
    weight, target, theta = normal(seed, shape, shape, (shape[0], shape[1] // 2))
    theta = size * theta
    assert distance(weight, rotate(weight, theta), best_angles(weight, rotate(weight, theta))) < 1e-24
    even, odd = (w[:, : shape[1] // 2 * 2].unflatten(1, (-1, 2)).norm(dim=2) for w in (weight, target))
    left = (odd - even).square().sum()
    if shape[1] % 2:
        left = left + (target[:, -1] - weight[:, -1]).square().sum()
    torch.testing.assert_close(distance(weight, target, best_angles(weight, target)), left)


@given(st.floats(-math.pi, math.pi), st.floats(-40, 40))
def test_the_quadratic_bound(d, x):
    sinc = math.sin(d) / d if d else 1.0
    assert 1 - math.cos(x) <= 1 - math.cos(d) + sinc * (x * x - d * d) / 2 + 1e-12


@given(st.tuples(st.integers(2, 6), st.integers(4, 13)), seeds, st.integers(1, 4), st.floats(0.01, 3))
def test_no_sweep_is_a_step_back(shape, seed, r, size):
    weight, change = normal(seed, shape, shape)
    target = weight + size * change
    shares = [
        explained_share(weight, target, angles(*best_factors(weight, target, r, sweeps, tolerance=0.0)))
        for sweeps in (0, 1, 2, 5)
    ]
    ceiling = explained_share(weight, target, best_angles(weight, target))
    slack = 1e-9
    assert -slack <= shares[0]
    assert all(later >= earlier - slack for earlier, later in itertools.pairwise(shares))
    assert shares[-1] <= ceiling + slack
    if r >= min(shape[0], shape[1] // 2):
        assert shares[0] == pytest.approx(ceiling, abs=1e-9)


def test_the_fit_ends_where_the_gradient_of_the_distance_vanishes():
    weight, change = normal(0, (12, 16), (12, 16))
    target = weight + 0.3 * change
    A, B, _ = best_factors(weight, target, 2, max_sweeps=2000, tolerance=0.0)
    A.requires_grad_()
    B.requires_grad_()
    start = torch.autograd.grad(distance(weight, target, 0.9 * A @ B), (A, B))
    end = torch.autograd.grad(distance(weight, target, A @ B), (A, B))
    assert all(e.norm() < 1e-5 * s.norm() for s, e in zip(start, end, strict=True))
    torch.testing.assert_close(A.T @ A, B @ B.T)


@pytest.mark.parametrize("columns", [40, 41], ids=["even", "odd"])
@pytest.mark.parametrize("sweeps", [0, 10])
def test_a_rotation_of_rank_r_is_found_at_rank_r(sweeps, columns):
    weight, A, B = normal(1, (30, columns), (30, 4), (4, columns // 2), dtype=torch.float32)
    theta = 0.3 * A @ B
    assert theta.abs().max() < math.pi
    target = rotate(weight, theta)
    factors = best_factors(weight, target, 4, sweeps)
    assert factors.A.shape == (30, 4)
    assert factors.B.shape == (4, columns // 2)
    turned = rotate(weight, angles(*factors))
    assert (turned - target).norm() < 1e-5 * (target - weight).norm()


def test_sweeps_follow_angles_beyond_pi():
    weight, A, B = normal(2, (80, 80), (80, 4), (4, 40))
    theta = 0.6 * A @ B
    assert (theta.abs() > math.pi).sum() > 20
    target = rotate(weight, theta)
    plain, fitted = (
        explained_share(weight, target, angles(*best_factors(weight, target, 4, sweeps, 0.0)))
        for sweeps in (0, 50)
    )
    assert plain < 0.99
    assert fitted > 0.9999


def test_ranks_that_restrict_nothing_are_filled_up_with_zeros():
    weight, target = normal(3, (5, 8), (5, 8))
    A, B, _ = best_factors(weight, target, 7)
    torch.testing.assert_close(A @ B, best_angles(weight, target))
    assert not A[:, 4:].any()
    assert not B[4:].any()


@pytest.mark.parametrize("sigma", [0.01, 0.3, 3.0])
def test_ceiling_of_an_isotropic_change_is_that_of_theory(sigma):
    """w' = w + n, n isotropic: |w'| is Rician, so E (|w'| - |w|)^2 = 2 |w|^2 + 2 s^2 - 2 |w| E |w'| with
    E |w'| = s sqrt(pi / 2) L_1/2(-x), x = |w|^2 / 2 s^2, L_1/2(-x) = e^(-x/2) ((1 + x) I0(x/2) + x I1(x/2)),
    and E |n|^2 = 2 s^2. For s << |w| half of the change is radial.
    """
    weight, noise = normal(4, (400, 800), (400, 800))
    ceiling = explained_share(weight, weight + sigma * noise, best_angles(weight, weight + sigma * noise))
    norms = weight.unflatten(1, (-1, 2)).norm(dim=2)
    x = norms.square() / (2 * sigma**2)
    laguerre = (1 + x) * torch.special.i0e(x / 2) + x * torch.special.i1e(x / 2)
    mean = sigma * math.sqrt(math.pi / 2) * laguerre
    expected = 1 - (2 * norms.square() + 2 * sigma**2 - 2 * norms * mean).mean().item() / (2 * sigma**2)
    assert ceiling == pytest.approx(expected, abs=0.006)  # 160 000 pairs
    if sigma == 0.01:
        assert ceiling == pytest.approx(0.5, abs=0.006)


def test_norm_change():
    weight, theta = normal(5, (6, 10), (6, 5))
    assert norm_change(weight, rotate(weight, theta)) < 1e-15
    assert norm_change(weight, 1.25 * weight) == pytest.approx(0.25)
    assert norm_change(torch.zeros(2, 4), torch.ones(2, 4)) is None


def test_nothing_changed_is_no_share_and_no_angle():
    (weight,) = normal(6, (4, 6))
    weight[0, :2] = 0
    assert explained_share(weight, weight, best_angles(weight, weight)) is None
    A, B, _ = best_factors(weight, weight, 2)
    assert not (A @ B).any()


def test_half_precision_is_computed_in_float32():
    weight, target = normal(7, (8, 12), (8, 12), dtype=torch.float16)
    phi = best_angles(weight, target)
    assert phi.dtype == torch.float32
    torch.testing.assert_close(phi, best_angles(weight.double(), target.double()).float())
    assert best_factors(weight, target, 2).A.dtype == torch.float32
