"""The experiment on larger pictures runs, and counts objects."""

import high_resolution
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from wadi.emoji import assets_folder
from wadi.emoji.captions import parse_caption
from wadi.emoji.evaluate import generate_in_batches, pipeline_generator
from wadi.emoji.judge import Judge
from wadi.files import read_json
from wadi.onestep.pipeline import load_for_steps


def test_figures_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(high_resolution, "STEPS", 2)
    out, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    options = {"samples": 2, "teacher_samples": 1, "sizes": (96,), "damping": (0.5,), "device": "cpu"}
    high_resolution.main(high_resolution.Options(out=out, picture=picture, **options))
    found = read_json(out)
    rows = [row for row in found["rows"] if row["steps"] == 1]
    ways = [(row["size"], row["redilated"], row["damping"]) for row in rows]
    assert ways == [(64, False, None), (96, False, None), (96, True, 0.0), (96, True, 0.5)]
    for row in found["rows"]:
        parts = [row[name] for name in ("alignment", "close_up", "clean")]
        assert 0 <= row["right"] <= min(parts)
        assert max(parts) <= 1
        assert row["samples"] == (2 if row["steps"] == 1 else 1)
    teacher = [(row["size"], row["redilated"]) for row in found["rows"] if row["steps"] == 2]
    assert teacher == [(64, False), (96, True)]
    (line,) = found["summary"]
    assert line["student"] == rows[2]["right"]
    assert Image.open(picture).width > 3 * 96


@pytest.fixture(scope="module")
def judge():
    return Judge.load(assets_folder() / "judge.safetensors")


CAPTIONS = ("a small panda on a red background", "a big rocket on a blue background") * 2


@pytest.fixture(scope="module")
def own():
    """(4, 3, 64, 64) in [0, 1]: a small and a big object, twice, as the student makes them."""
    pipeline = load_for_steps(assets_folder() / "teacher", assets_folder() / "student", 1)
    images = generate_in_batches(pipeline_generator(pipeline, 1, 1.0), list(CAPTIONS), seed=0, batch_size=4)
    return images.float() / 255


def speckled(images, deviation=0.1):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + deviation * noise).clamp(0, 1)


@pytest.mark.parametrize("side", [64, 128, 192])
@pytest.mark.parametrize("deviation", [0.01, 0.04])
def test_grain_is_that_of_the_noise_at_every_size(side, deviation):
    """Noise of deviation s differs from its mean of 9 by s sqrt(8 / 9); gradients and a large object do not
    count."""
    ground = torch.linspace(0.3, 0.6, side).expand(2, 3, side, side).clone()
    assert (high_resolution.grain(ground) < 0.05).all()
    noisy = speckled(ground, deviation)
    noisy[1, :, : side // 2] = torch.rand(3, side // 2, side, generator=torch.Generator().manual_seed(1))
    expected = 255 * deviation * (8 / 9) ** 0.5
    assert high_resolution.grain(noisy).tolist() == pytest.approx([expected] * 2, rel=0.1)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_close_up_shows_the_object_at_the_images_own_resolution(judge, own, factor):
    """In a window of 64 px an object is as many times as large as the image, up to `CLOSE_UP`; no pixel is
    mixed."""
    large = F.interpolate(own[:2], scale_factor=factor, mode="nearest")
    windows = high_resolution.close_ups(judge, large)
    expected = (factor * judge.read(own[:2]).size[:, 0]).clamp(max=high_resolution.CLOSE_UP)
    assert judge.read(windows).size[:, 0].tolist() == pytest.approx(expected.tolist(), abs=0.1)
    for window, image in zip(windows, own, strict=False):
        assert set(window.flatten().tolist()) <= set(image.flatten().tolist())
    assert torch.equal(high_resolution.close_ups(judge, own), own)  # of 64 px there is nothing closer


def test_speckle_and_patches_are_not_right_however_they_look_when_reduced(judge, own):
    """Enlarged images are right; the same with noise, or with patches that changed places, are not."""
    captions = [parse_caption(text) for text in CAPTIONS]
    large = F.interpolate(own, size=128, mode="bicubic").clamp(0, 1)
    assert high_resolution.read(judge, large, captions)["right"] == 1
    noisy = high_resolution.read(judge, speckled(large), captions)
    assert noisy["alignment"] >= 0.75  # the mean of four pixels has half the noise
    assert noisy["clean"] == noisy["right"] == 0
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    patches = F.unfold(large, 8, stride=8)[..., order]
    shuffled = high_resolution.read(judge, F.fold(patches, (128, 128), 8, stride=8), captions)
    assert shuffled["right"] == 0


def test_two_objects_are_counted_as_two(judge):
    pipeline = load_for_steps(assets_folder() / "teacher", assets_folder() / "student", 1)
    texts = ["a big panda on a red background"] * 4 + ["a panda left of an apple on a red background"] * 4
    images = generate_in_batches(pipeline_generator(pipeline, 1, 1.0), texts, seed=0, batch_size=8)
    counted = high_resolution.objects(judge, images.float() / 255)
    assert counted[:4].double().mean() < 1.5 < counted[4:].double().mean()
    assert high_resolution.objects(judge, torch.full((1, 3, 64, 64), 0.5)).item() == 0
