"""Figures of pixels on images whose figures are known."""

from itertools import combinations

import pytest
import torch

from wadi.metrics.pixels import pixel_detail, pixel_spread


def plain(*values, side=40):
    """An image of one grey for each value."""
    return torch.stack([torch.full((3, side, side), value, dtype=torch.uint8) for value in values])


@pytest.mark.parametrize(("values", "spread"), [((9, 9, 9), 0.0), ((0, 255), 255.0), ((0, 30, 30), 20.0)])
@pytest.mark.parametrize("side", [8, 32, 100])
def test_spread_of_plain_images(values, spread, side):
    assert pixel_spread(plain(*values, side=side)[None]) == pytest.approx(spread)


def test_spread_is_the_mean_over_prompts_and_pairs():
    images = torch.randint(256, (3, 4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    pairs = [
        (prompt[i].double() - prompt[j].double()).square().mean().sqrt().item()
        for prompt in images
        for i, j in combinations(range(4), 2)
    ]
    assert pixel_spread(images) == pytest.approx(sum(pairs) / len(pairs))


def test_grain_is_not_spread():
    noise = torch.randint(256, (1, 2, 3, 512, 512), generator=torch.Generator().manual_seed(0)).byte()
    assert pixel_spread(noise) < 0.1 * pixel_spread(noise[..., :32, :32])


def test_detail_of_stripes_and_plain_images():
    assert pixel_detail(plain(7, 200)) == 0.0
    stripes = torch.tensor([0, 100], dtype=torch.uint8).repeat(4).expand(1, 3, 8, 8)
    assert pixel_detail(stripes) == pixel_detail(stripes.mT) == 50.0  # in one of two directions
