"""Against loops in float64, and cases that anyone knows."""

import math

import pytest
import torch

from wadi.errors import WadiError
from wadi.metrics import precision_recall


def share_inside(samples, manifold, k):
    """The definition, point by point: within reach of any ball of the manifold."""
    radii = [
        sorted(math.dist(point, other) for j, other in enumerate(manifold) if j != i)[k - 1]
        for i, point in enumerate(manifold)
    ]
    inside = [
        any(math.dist(sample, point) <= radius for point, radius in zip(manifold, radii, strict=True))
        for sample in samples
    ]
    return sum(inside) / len(inside)


@pytest.mark.parametrize("k", [1, 3])
def test_equals_the_definition(k):
    generator = torch.Generator().manual_seed(k)
    real = torch.randn(70, 4, generator=generator)
    fake = 0.8 * torch.randn(50, 4, generator=generator) + 0.7
    expected = share_inside(fake.tolist(), real.tolist(), k), share_inside(real.tolist(), fake.tolist(), k)
    assert min(expected) > 0
    assert max(expected) < 1
    assert precision_recall(real, fake, k) == pytest.approx(expected, abs=1e-12)


def test_more_samples_than_are_compared_at_once():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 1100, 2, generator=generator)
    fake = fake[:1050] + torch.tensor([1.5, 0.0])

    def inside(samples, manifold):
        radius = torch.cdist(manifold, manifold).sort(1).values[:, 3]
        return (torch.cdist(samples, manifold) <= radius).any(1).double().mean().item()

    real64, fake64 = real.double(), fake.double()
    expected = inside(fake64, real64), inside(real64, fake64)
    # float32 may put a sample that lies on the edge of a ball on its other side.
    assert precision_recall(real, fake) == pytest.approx(expected, abs=2.5 / 1050)


def test_identical_sets():
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert precision_recall(features, features) == (1.0, 1.0)


def test_sets_far_apart():
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    assert precision_recall(features, features + 100) == (0.0, 0.0)


def test_a_collapsed_generator_is_precise_but_recalls_little():
    real = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    fake = real[:1] + 1e-3 * torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    precision, recall = precision_recall(real, fake)
    assert precision == 1.0
    assert recall <= 2 / 200


@pytest.mark.parametrize(("real", "fake"), [(3, 10), (10, 3), (0, 10)])
def test_too_few_are_one_line(real, fake):
    with pytest.raises(WadiError, match=f"at least 4 .* {real} real and {fake} generated"):
        precision_recall(torch.zeros(real, 2), torch.zeros(fake, 2))
    assert precision_recall(torch.zeros(4, 2), torch.zeros(4, 2)) == (1.0, 1.0)
