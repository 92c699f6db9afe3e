"""Entropies that can be counted on one's fingers."""

import math
from itertools import combinations

import pytest
import torch

from wadi.metrics import entropy_bits, spread


@pytest.mark.parametrize(
    ("classes", "bits"),
    [
        (list(range(10)) * 3, math.log2(10)),
        ([4] * 7, 0.0),
        ([0, 9], 1.0),
        ([0, 1, 2, 2], 1.5),
    ],
)
def test_entropy(classes, bits):
    assert entropy_bits(torch.tensor(classes), 10) == pytest.approx(bits, abs=1e-12)


def test_spread_of_known_pictures():
    same = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])  # one direction
    across = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])  # cosines 0, -1, 0
    assert spread(same[None]) == pytest.approx(0, abs=1e-12)
    assert spread(across[None]) == pytest.approx(4 / 3)
    assert spread(torch.stack([same, across])) == pytest.approx(2 / 3)


def test_spread_is_the_mean_over_pairs():
    features = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0))
    pairs = [
        1 - torch.cosine_similarity(prompt[i].double(), prompt[j].double(), dim=0).item()
        for prompt in features
        for i, j in combinations(range(4), 2)
    ]
    assert spread(features) == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)
