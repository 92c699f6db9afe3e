"""Subjects that the teacher never saw: their scenes, and the recogniser that reads them."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.emoji.cases import needs_font
from wadi.cli import main
from wadi.emoji import assets_folder, student_folder, teacher_folder
from wadi.emoji.captions import COLOURS, PLACES, SIZES, parse_caption
from wadi.emoji.glyphs import ATLAS_SIZE
from wadi.emoji.judge import Judge
from wadi.emoji.subject import (
    EXAMPLES,
    Recogniser,
    draw_subjects,
    drawn_scenes,
    example_pictures,
    examples_folder,
    object_features,
    subject_captions,
    subject_figures,
)
from wadi.emoji.train_judge import blemish
from wadi.errors import WadiError
from wadi.onestep import OneStepPipeline

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
    for picture, (size, place, background) in zip(example_pictures(SQUARE), EXAMPLES, strict=True):
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
    one, same, other = (np.stack(list(map(np.asarray, example_pictures(SQUARE, seed)))) for seed in (0, 0, 1))
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


def test_features_are_of_the_cell_where_the_object_is(judge):
    """Moved by one cell of eight pixels, an object has the same features, but for its edges."""
    picture = shipped()[:1]
    small = torch.full((1, 3, 64, 64), 0.5)
    object_ = torch.nn.functional.interpolate(picture, size=24, mode="area")
    features = []
    for left in (16, 24):
        image = small.clone()
        image[..., 20:44, left : left + 24] = object_
        features.append(object_features(judge, image))
    assert features[0].shape == (1, 384)
    assert torch.cosine_similarity(*features) > 0.95


def test_the_recogniser_knows_the_subject_again_and_nothing_else(judge):
    """Fitted to three pictures of the hedgehog and to others of the student, tested on three more of each."""
    student = OneStepPipeline.from_pretrained(teacher_folder(), student_folder())
    names = ("a dog", "a cookie", "a guitar", "a koala", "a robot", "an owl", "a mushroom", "a bear")
    others = student([*names, *names], seed=0, output_type="pt").float()
    generator = torch.Generator().manual_seed(0)
    hedgehog = shipped()
    fitted = blemish(hedgehog[:3].repeat(6, 1, 1, 1), generator), blemish(others[:8], generator)
    recogniser = Recogniser(judge, *fitted)
    assert recogniser(hedgehog[3:]).double().mean() >= 2 / 3
    assert recogniser(others[8:]).double().mean() <= 1 / 8
    again = Recogniser(judge, *fitted)
    assert torch.equal(recogniser.weight, again.weight)

    columns = {name: torch.full((6,), -1) for name in ("size", "place", "relation", "background")}
    columns["emoji"] = torch.tensor([[0, -1]] * 6)
    columns["background"] = torch.tensor([COLOURS.index(background) for _, _, background in EXAMPLES])
    figures = subject_figures(recogniser, (hedgehog * 255).round().to(torch.uint8), columns)
    assert figures["background"] == 1
    assert figures["recognised"] >= 5 / 6
    assert figures["all"] <= min(figures.values())
    columns["background"] = (columns["background"] + 1) % len(COLOURS)
    assert subject_figures(recogniser, hedgehog, columns)["all"] == 0


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
