"""What a caption states holds in its scene; what a scene says holds in its pixels."""

import colorsys
import dataclasses
import math

import pytest
import torch

from tests.emoji.cases import synthetic_atlas
from wadi.emoji.captions import COLOURS, is_held_out_background, sample_captions, stated
from wadi.emoji.judge import Reading, attributes_right
from wadi.emoji.scenes import _HSV, Scenes, render, sample_scenes

COUNT = 4000


@pytest.fixture(scope="module")
def columns():
    held_out = sample_captions(COUNT // 2, "scenes", split="held-out")
    return stated(sample_captions(COUNT // 2, "scenes") + held_out)


@pytest.fixture(scope="module")
def scenes(columns):
    return sample_scenes(columns, torch.Generator().manual_seed(0))


def test_sizes(columns, scenes):
    single = columns["emoji"][:, 1] < 0
    for size, low, high in ((0, 0.32, 0.42), (1, 0.58, 0.72), (-1, 0.32, 0.72)):
        drawn = scenes.size[single & (columns["size"] == size), 0]
        assert low <= drawn.min() < low + 0.01
        assert high - 0.01 < drawn.max() <= high
    pair = scenes.size[~single]
    assert pair.min() >= 0.34
    assert pair.max() <= 0.46


def test_places(columns, scenes):
    single = columns["emoji"][:, 1] < 0
    room = 0.5 - scenes.size[:, 0] / 2
    x, y = ((scenes.center[:, 0] - 0.5) / room[:, None]).unbind(1)
    edge = 1 + 1e-5  # objects stay inside the picture
    assert x[single].abs().max() <= edge
    assert y[single].abs().max() <= edge
    place = columns["place"]
    for index, coordinate in enumerate((-x, x, -y, y)):
        assert coordinate[place == index].min() >= 0.6 - 1e-5
    assert torch.stack([x, y])[:, place == 4].abs().max() <= 0.12 + 1e-5
    # Left free, a place is anywhere: a uniform variable in [-1, 1] has standard deviation 1 / sqrt(3).
    free = single & (place < 0)
    assert x[free].std().item() == pytest.approx(3**-0.5, abs=0.05)


def test_relations(columns, scenes):
    relation, pair = columns["relation"], columns["relation"] >= 0
    dx, dy = (scenes.center[:, 1] - scenes.center[:, 0]).unbind(1)
    assert (dx > dy.abs())[relation == 1].all()
    assert (dy > dx.abs())[relation == 2].all()
    # The judge tells two objects apart when they are more than two of its cells (1 / 8) from each other.
    assert dx.abs().maximum(dy.abs())[pair].min() >= 0.45
    # "and" leaves it free: each of the four arrangements about as often.
    any_pair = relation == 0
    for arrangement in (dx > dy.abs(), -dx > dy.abs(), dy > dx.abs(), -dy > dx.abs()):
        assert arrangement[any_pair].double().mean().item() == pytest.approx(0.25, abs=0.08)


def test_backgrounds(columns, scenes):
    background = columns["background"]
    assert (scenes.background == background)[background >= 0].all()
    free = background < 0
    assert set(scenes.background[free].tolist()) == set(range(len(COLOURS)))
    for emoji, drawn in zip(columns["emoji"][free].tolist(), scenes.background[free].tolist(), strict=True):
        assert not any(is_held_out_background(index, drawn) for index in emoji if index >= 0)


def test_colours_are_shades_of_the_background(scenes):
    for background, rgb in zip(scenes.background.tolist(), scenes.colour.tolist(), strict=True):
        hue, saturation, value = _HSV[background]
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        assert abs(v - value) <= 0.05 + 1e-5
        if saturation == 0:
            assert s <= 1e-5
        else:
            assert abs(s - saturation) <= 0.07 + 1e-4
            assert abs((360 * h - hue + 180) % 360 - 180) <= 6 + 1e-2


def test_the_judge_s_rules_agree_with_every_scene(columns, scenes):
    reading = Reading(
        scenes.emoji,
        torch.ones(COUNT, 2),
        scenes.center,
        scenes.size,
        scenes.background,
        torch.zeros(COUNT, 1),
    )
    for name, right in attributes_right(reading, columns).items():
        assert right.all(), name


def test_a_seed_names_the_scenes(columns, scenes):
    again = sample_scenes(columns, torch.Generator().manual_seed(0))
    other = sample_scenes(columns, torch.Generator().manual_seed(1))
    for field in dataclasses.fields(Scenes):
        assert torch.equal(getattr(again, field.name), getattr(scenes, field.name))
    assert not torch.equal(other.center, scenes.center)


def scene(emoji=(0, -1), center=((0.5, 0.5), (0.5, 0.5)), size=(0.5, 0.5), angle=0.0, mirror=1.0, **changes):
    """One scene with a black background, unless changed."""
    values = {
        "emoji": emoji,
        "center": center,
        "size": size,
        "angle": (angle, angle),
        "mirror": (mirror, mirror),
        "background": 0,
        "colour": (0.0, 0.0, 0.0),
        "gradient": (0.0, 0.0),
    } | changes
    return Scenes(**{name: torch.tensor([value]) for name, value in values.items()})


def picture(**changes):
    return render(scene(**changes), synthetic_atlas())[0]


def mass_and_centroid(image):
    """Area in pixels and centre in fractions of the side, of what is not black; float64 loops over pixels."""
    total = x = y = 0.0
    for row, line in enumerate(image.double().mean(0).tolist()):
        for column, value in enumerate(line):
            total += value
            x += value * (column + 0.5) / 64
            y += value * (row + 0.5) / 64
    return total, x / total, y / total


@pytest.mark.parametrize("angle", [0.0, 0.4, -0.3])
@pytest.mark.parametrize(("center", "size"), [((0.5, 0.5), 0.5), ((0.3, 0.6), 0.4), ((0.62, 0.36), 0.47)])
def test_a_square_lands_where_the_scene_says(center, size, angle):
    area, x, y = mass_and_centroid(picture(center=(center, center), size=(size, size), angle=angle))
    assert (x, y) == pytest.approx(center, abs=0.25 / 64)
    assert math.sqrt(area) == pytest.approx(64 * size, abs=0.6)


@pytest.mark.parametrize("angle", [0.0, 0.4, -0.3])
@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_angle_and_mirror(angle, mirror):
    """Half a square: its centroid is a quarter of the side from the middle, leftwards before all turning."""
    size, area_of_half = 0.5, 0.5 * 32**2
    area, x, y = mass_and_centroid(picture(emoji=(1, -1), angle=angle, mirror=mirror))
    offset = -mirror * size / 4
    expected = 0.5 + offset * math.cos(angle), 0.5 + offset * math.sin(angle)
    assert (x, y) == pytest.approx(expected, abs=0.25 / 64)
    assert area == pytest.approx(area_of_half, rel=0.04)


def test_background_and_gradient():
    image = picture(emoji=(-1, -1), colour=(0.2, 0.9, 0.5), gradient=(0.08, -0.04))
    assert image.max() == 1.0  # cut off in the lighter corner
    for column, row in ((0, 0), (63, 0), (10, 40), (63, 63)):
        x, y = ((2 * pixel + 1) / 64 - 1 for pixel in (column, row))
        expected = [min(channel * (1 + 0.08 * x - 0.04 * y), 1) for channel in (0.2, 0.9, 0.5)]
        assert image[:, row, column].tolist() == pytest.approx(expected, abs=1e-6)


def test_glyphs_lie_over_the_background_and_the_second_over_the_first():
    alpha = 128 / 255
    image = picture(emoji=(2, -1), colour=(0.2, 0.4, 0.6))
    expected = [alpha + (1 - alpha) * 0.2, (1 - alpha) * 0.4, (1 - alpha) * 0.6]
    assert image[:, 32, 32].tolist() == pytest.approx(expected, abs=1e-5)
    assert image[:, 2, 2].tolist() == pytest.approx([0.2, 0.4, 0.6], abs=1e-6)
    assert picture(emoji=(2, 0))[:, 32, 32].tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert picture(emoji=(0, 2))[:, 32, 32].tolist() == pytest.approx([1, 1 - alpha, 1 - alpha], abs=1e-5)


def test_pictures_are_the_same_alone_and_from_a_float_atlas(scenes):
    atlas = synthetic_atlas()
    images = render(scenes[:8], atlas)
    assert images.shape == (8, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(render(scenes[3:4], atlas), images[3:4])
    torch.testing.assert_close(render(scenes[:8], atlas.float() / 255), images)
