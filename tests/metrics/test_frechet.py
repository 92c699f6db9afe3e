"""Against closed forms for Gaussians, and against eigenvalues in float64."""

import pytest
import torch

from wadi.metrics import feature_statistics, frechet_distance


def white(count=400, dim=6, seed=0):
    """Features of mean 0 whose sample covariance (divisor N - 1) is the identity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    factor = torch.linalg.cholesky(x.T @ x / (count - 1))
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T


def distance(first, second):
    return frechet_distance(feature_statistics(first), feature_statistics(second))


def test_statistics_are_sums():
    features = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    statistics = feature_statistics(features)
    assert statistics["sum"].tolist() == [4.0, 7.0]
    assert statistics["cov_sum"].tolist() == [[10.0, 17.0], [17.0, 29.0]]
    assert statistics["count"] == 2


def test_a_set_is_at_distance_zero_from_itself():
    features = white() @ torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64)) + 3
    assert distance(features, features) == pytest.approx(0, abs=1e-6)


def test_a_shift_costs_its_square():
    features = white()
    shift = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.1, 0.0], dtype=torch.float64)
    assert distance(features, features + shift) == pytest.approx(0.25 + 1 + 4 + 0.01, rel=1e-6)


def test_diagonal_covariances():
    first = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.1], dtype=torch.float64)
    second = torch.tensor([1.5, 1.0, 0.5, 0.2, 4.0, 0.3], dtype=torch.float64)
    expected = sum((a - b) ** 2 for a, b in zip(first.tolist(), second.tolist(), strict=True))
    assert distance(white() * first, white(seed=1) * second) == pytest.approx(expected, rel=1e-6)


def test_any_covariances():
    generator = torch.Generator().manual_seed(2)
    first, second = (
        torch.randn(300, 8, generator=generator, dtype=torch.float64)
        @ torch.randn(8, 8, generator=generator, dtype=torch.float64)
        + offset
        for offset in (0.0, 0.7)
    )

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    s1, s2 = first.T.cov(), second.T.cov()
    cross = root(root(s1) @ s2 @ root(s1)).trace()
    expected = (first.mean(0) - second.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * cross
    assert distance(first, second) == pytest.approx(expected.item(), rel=1e-6)
