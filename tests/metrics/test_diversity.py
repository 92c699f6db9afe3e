"""Entropies that can be counted on one's fingers."""

import math

import pytest
import torch

from wadi.metrics import entropy_bits


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
