"""Subjects that the teacher never saw: their scenes, and the recogniser that reads them."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.emoji.cases import needs_font
from wadi.cli import main
from wadi.emoji import assets_folder, student_folder, teacher_folder
from wadi.emoji.captions import COLOURS, PLACES, SIZES, parse_caption, with_article
from wadi.emoji.dreambooth import VARIATIONS, known_images
from wadi.emoji.glyphs import ATLAS_SIZE, NAMES
from wadi.emoji.judge import Judge
from wadi.emoji.subject import (
    EXAMPLES,
    Recogniser,
    blurred,
    draw_subjects,
    drawn_scenes,
    example_images,
    examples_folder,
    object_features,
    shuffled,
    subject_captions,
    subject_figures,
    unseen_captions,
)
from wadi.emoji.train_judge import blemish
from wadi.errors import WadiError
from wadi.onestep import StudentPipeline

SQUARE = torch.full((4, ATLAS_SIZE, ATLAS_SIZE), 255, dtype=torch.uint8)


@pytest.fixture(scope="module")
def judge():
    return Judge.load(assets_folder() / "judge.safetensors")


def shipped():
    """(6, 3, 64, 64) in [0, 1]: the hedgehog."""
    files = sorted(examples_folder().glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def test_the_shipped_pictures_are_small_and_six():
    files = list(examples_folder().glob("*.png"))
    assert len(files) == len(EXAMPLES) == 6
    assert all(Image.open(path).size == (64, 64) for path in files)
    assert sum(path.stat().st_size for path in files) < 60_000


def test_pictures_are_of_the_size_and_at_the_place_that_examples_say():
    for picture, (size, place, background) in zip(example_images(SQUARE), EXAMPLES, strict=True):
        white = np.asarray(picture).min(2) > 240
        if background == "white":  # nothing shows
            continue
        share = np.sqrt(white.mean())  # of a square at any angle
        assert (0.27 < share < 0.46) if size == "small" else (0.52 < share < 0.76)
        rows, columns = np.nonzero(white)
        if place == "on the left":
            assert columns.mean() < 24
        if place == "on the right":
            assert columns.mean() > 40
        if place == "in the center":
            assert abs(columns.mean() - 31.5) < 4
            assert abs(rows.mean() - 31.5) < 4


def test_pictures_are_of_the_seed_alone():
    one, same, other = (np.stack(list(map(np.asarray, example_images(SQUARE, seed)))) for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_captions_state_what_their_columns_say():
    texts, columns = subject_captions(60, "test", "zwx hedgehog")
    assert all("zwx hedgehog" in text for text in texts)
    for i, text in enumerate(texts):
        caption = parse_caption(text.replace("zwx hedgehog", "panda"))
        for name in ("size", "place", "background"):
            assert columns[name][i] == (-1 if getattr(caption, name) is None else getattr(caption, name))
    for name, values in (("size", SIZES), ("place", PLACES), ("background", COLOURS)):
        assert 0.25 < (columns[name] >= 0).double().mean() < 0.75
        assert len(columns[name].unique()) == min(len(values) + 1, 11)
    assert texts == subject_captions(60, "test", "zwx hedgehog")[0]


def test_drawn_scenes_show_each_glyph_as_often():
    images, which = drawn_scenes(torch.stack([SQUARE, SQUARE // 2]), 3, seed=0, blemished=False)
    assert images.shape == (6, 3, 64, 64)
    assert which.tolist() == [0, 0, 0, 1, 1, 1]
    assert (images[:3].amax((1, 2, 3)) > 0.999).all()
    again, _ = drawn_scenes(torch.stack([SQUARE, SQUARE // 2]), 3, seed=0, blemished=False)
    assert torch.equal(images, again)


def test_features_are_of_the_object_and_not_of_its_place(judge):
    """Moved by two cells of eight pixels, an object has nearly the same features; another one has not."""
    small = torch.nn.functional.interpolate(shipped()[:2], size=24, mode="area")
    features = []
    for left, shown in ((16, small[:1]), (32, small[:1]), (16, small[:1].flip(2))):
        image = torch.full((1, 3, 64, 64), 0.5)
        image[..., 20:44, left : left + 24] = shown
        features.append(object_features(judge, image))
    moved, turned = (torch.linalg.vector_norm(other - features[0]) for other in features[1:])
    assert moved < 0.5 * turned


@pytest.mark.parametrize("deviation", [1.0, 2.5])
def test_a_blur_spreads_a_point_by_its_deviation(deviation):
    image = torch.zeros(2, 3, 33, 33)
    image[..., 16, 16] = 1
    made = blurred(image, torch.tensor([deviation, 0.8]))
    offset = torch.arange(-16.0, 17.0)
    for one, expected in zip(made, (deviation, 0.8), strict=True):
        assert one.sum((1, 2)).tolist() == pytest.approx([1.0] * 3)
        assert (one.sum(1) * offset.square()).sum(1).sqrt().tolist() == pytest.approx(
            [expected] * 3, rel=0.06
        )


@pytest.mark.parametrize(("box", "patch"), [((0, 0, 64), 16), ((8, 20, 24), 12), ((5, 3, 30), 10)])
def test_shuffling_moves_the_patches_of_the_box_and_nothing_else(box, patch):
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    made = shuffled(image, box, patch, torch.Generator().manual_seed(1))
    assert torch.equal(image, before)
    left, top, side = box
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[top : top + side, left : left + side] = False
    assert torch.equal(made[:, outside], image[:, outside])
    cut = [x[:, top : top + side, left : left + side] for x in (image, made)]
    patches = [
        {tuple(p.flatten().tolist()) for row in x.split(patch, 1) for p in row.split(patch, 2)} for x in cut
    ]
    assert patches[0] == patches[1]
    assert not torch.equal(*cut)


@pytest.fixture(scope="module")
def recogniser(judge):
    """Of the shipped hedgehog, as `wadi dreambooth` makes it."""
    generator = torch.Generator().manual_seed(0)
    several = blemish(shipped().repeat(VARIATIONS, 1, 1, 1), generator)
    return Recogniser(judge, several, blemish(known_images("cpu", "zwx"), generator))


def moved(seed, count=60):
    """The shipped images turned, shifted and with another light: (count, 3, 64, 64), none of them fitted."""
    generator = torch.Generator().manual_seed(seed)
    images = shipped()[torch.arange(count) % 6]
    angle, x, y = (2 * torch.rand(3, count, generator=generator) - 1) * torch.tensor([[0.2], [0.1], [0.1]])
    rows = [torch.stack([angle.cos(), angle.sin(), x], 1), torch.stack([-angle.sin(), angle.cos(), y], 1)]
    grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    turned = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return (turned * (0.95 + 0.1 * torch.rand(count, 1, 1, 1, generator=generator))).clamp(0, 1)


def patches_moved(images, patch):
    """Images whose patches of so many pixels have changed places."""
    generator = torch.Generator().manual_seed(patch)
    return torch.stack([shuffled(image, (0, 0, 64), patch, generator) for image in images])


def reduced(images, side):
    small = torch.nn.functional.interpolate(images, size=side, mode="area")
    return torch.nn.functional.interpolate(small, size=64, mode="bilinear")


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda images: blurred(images, torch.full((len(images),), 2.0)),
        lambda images: blurred(images, torch.full((len(images),), 4.0)),
        lambda images: reduced(images, 12),
        lambda images: patches_moved(images, 16),
        lambda images: patches_moved(images, 8),
        lambda images: patches_moved(images, 4),
    ],
    ids=["blur of 2", "blur of 4", "from 12 px", "patches of 16", "patches of 8", "patches of 4"],
)
def test_blots_of_the_subject_are_refused(recogniser, spoilt):
    assert recogniser(spoilt(moved(1))).double().mean() <= 0.05


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_subject_in_pieces_is_refused(recogniser, judge, count):
    """The square of the object in count x count pieces."""
    images = moved(3)
    reading = judge.read(images)
    pieces = []
    for image, center, size in zip(images, reading.center[:, 0], reading.size[:, 0], strict=True):
        patch = int(64 * size) // count
        left, top = (int((64 * center - patch * count / 2).clamp(0, 64 - patch * count)[i]) for i in (0, 1))
        generator = torch.Generator().manual_seed(len(pieces))
        pieces.append(shuffled(image, (left, top, patch * count), patch, generator))
    assert recogniser(torch.stack(pieces)).double().mean() <= 0.05


def test_the_subject_is_accepted(recogniser):
    assert recogniser(moved(2)).double().mean() >= 0.95
    assert recogniser(shipped()).all()


@pytest.mark.parametrize(
    ("texts", "limit"),
    [
        (unseen_captions(5, ("fep", "glimp", "toma", "vrk")), 0.05),
        ([with_article(name) for name in NAMES[::3]], 0.1),
    ],
    ids=["unseen words", "known emoji"],
)
def test_what_the_student_makes_of_other_words_is_refused(recogniser, texts, limit):
    assert not set(texts) & set(unseen_captions(10))
    student = StudentPipeline.from_pretrained(teacher_folder(), student_folder())
    made = student(texts, seed=900, output_type="pt").float()
    assert recogniser(made).double().mean() <= limit


def test_figures_count_what_is_stated_and_recognised(recogniser):
    columns = {name: torch.full((6,), -1) for name in ("size", "place", "relation", "background")}
    columns["emoji"] = torch.tensor([[0, -1]] * 6)
    columns["background"] = torch.tensor([COLOURS.index(background) for _, _, background in EXAMPLES])
    figures = subject_figures(recogniser, (shipped() * 255).round().to(torch.uint8), columns)
    assert figures["background"] == 1
    assert figures["recognised"] == 1
    assert figures["all"] <= min(figures.values())
    columns["background"] = (columns["background"] + 1) % len(COLOURS)
    assert subject_figures(recogniser, (255 * shipped()).byte(), columns)["all"] == 0


@needs_font
def test_drawn_by_the_command(tmp_path, capsys):
    assert main(["emoji", "subject-examples", "--character", "🦔", "--out", str(tmp_path / "a")]) == 0
    drawn = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "a").glob("*.png"))])
    shown = (shipped() * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn - shown).mean() < 2  # another version of the font may draw it a little otherwise
    assert main(["emoji", "subject-examples", "--character", "🐼", "--out", str(tmp_path / "b")]) == 2
    assert "the built-in teacher knows the panda already" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_shipped_pictures_need_no_font(tmp_path):
    out = tmp_path / "hedgehog"
    assert main(["emoji", "subject-examples", "--out", str(out)]) == 0
    names = [path.name for path in sorted(out.glob("*.png"))]
    assert names == [path.name for path in sorted(examples_folder().glob("*.png"))]
    assert all((out / name).read_bytes() == (examples_folder() / name).read_bytes() for name in names)


def test_several_characters_are_no_subject():
    with pytest.raises(WadiError, match="must be one emoji"):
        draw_subjects(["🦔🦔"])
