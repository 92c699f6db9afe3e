"""The evaluation: the same pictures whatever the batch, and figures that can be counted by hand."""

import json
import math

import pytest
import torch

from tests.emoji.cases import synthetic_atlas
from wadi import cli
from wadi.emoji import evaluate as module
from wadi.emoji import student_folder
from wadi.emoji.captions import RELATIONS, is_held_out, parse_caption, sample_captions, stated
from wadi.emoji.evaluate import (
    EvaluateConfig,
    alignment_by,
    evaluate,
    evaluated_pipeline,
    evaluation_captions,
    free_attributes,
    generate_in_batches,
    pipeline_generator,
)
from wadi.emoji.judge import Reading
from wadi.emoji.scenes import render, sample_scenes
from wadi.errors import WadiError
from wadi.files import save_tensors


@pytest.fixture(scope="module")
def generate():
    return pipeline_generator(evaluated_pipeline(EvaluateConfig(device="cpu")), 1, 1.0)


def test_batches_do_not_change_the_pictures(generate):
    prompts = [caption.text for caption in sample_captions(8, "batches")]
    whole, parts = (generate_in_batches(generate, prompts, 5, size).int() for size in (8, 3))
    assert whole.shape == (8, 3, 64, 64)
    assert whole.float().std() > 10  # not one flat colour
    # Convolutions of other batches may differ in the last bit, which may round to the next of 256 values.
    assert (whole - parts).abs().max() <= 1
    assert (whole != parts).double().mean() < 1e-2
    assert (generate([prompts[2]], [7]).int() - whole[2]).abs().max() <= 1


def test_real_pictures_are_the_renderers(tmp_path):
    atlas = synthetic_atlas()
    save_tensors(tmp_path / "atlas.safetensors", {"atlas": atlas})
    captions = sample_captions(7, "drawn")
    whole, parts = (
        module.evaluated_images(
            EvaluateConfig(
                real=True, atlas=tmp_path / "atlas.safetensors", seed=5, batch_size=size, device="cpu"
            ),
            captions,
        )
        for size in (7, 3)
    )
    assert torch.equal(whole, parts)
    scenes = sample_scenes(stated(captions), torch.Generator().manual_seed(5))
    assert torch.equal(whole, (render(scenes, atlas) * 255).round().to(torch.uint8))


def test_another_seed_is_another_picture(generate):
    first, second = generate(["a panda", "a panda"], [0, 1]).float()
    assert (first - second).abs().mean() > 1


def reading(background, x, size):
    count = len(background)
    center = torch.zeros(count, 2, 2)
    center[:, 0, 0] = torch.tensor(x)
    sizes = torch.tensor(size)[:, None].expand(count, 2)
    zeros = torch.zeros(count, 2)
    return Reading(zeros.long(), zeros, center, sizes, torch.tensor(background), torch.zeros(count, 128))


def test_free_attributes_are_counted_where_the_caption_leaves_them_free():
    captions = [
        *["a cat"] * 2,
        "a cat on the left on a red background",
        "a big cat on a red background",
        "a cat and a dog",
        "a cat left of a dog",
    ]
    columns = stated([parse_caption(caption) for caption in captions])
    figures = free_attributes(
        reading([0, 1, 9, 9, 2, 3], [0.2, 0.6, 9.0, 0.4, 9.0, 9.0], [0.3, 0.5, 0.4, 9.0, 9.0, 9.0]), columns
    )
    assert figures["background_entropy"] == pytest.approx(2.0)  # four colours in four free pictures
    # x of 0.2, 0.4, 0.6 has standard deviation 0.2; y is always the same; the mean of the two, in pixels.
    assert figures["place_spread"] == pytest.approx(64 * 0.1, rel=1e-5)
    assert figures["size_spread"] == pytest.approx(64 * 0.1, rel=1e-5)


def test_entropy_of_places_and_sizes():
    # nine cells of the room that an object of half the side has: thirds of [0.25, 0.75]
    thirds = (0.25 + 0.5 / 6, 0.5, 0.75 - 0.5 / 6)
    places = [(x, y) for x in thirds for y in thirds]
    seen = reading([0] * 9, [0.0] * 9, [0.5] * 9)
    seen.center[:, 0] = torch.tensor(places)
    figures = free_attributes(seen, stated([parse_caption("a cat")] * 9))
    assert figures["place_entropy"] == pytest.approx(math.log2(9))
    assert figures["size_entropy"] == pytest.approx(0.0, abs=1e-9)
    # four ranges of 0.1 each between 0.32 and 0.72, the last one twice: 1/5, 1/5, 1/5, 2/5
    figures = free_attributes(
        reading([0] * 5, [0.5] * 5, [0.33, 0.45, 0.6, 0.7, 0.9]), stated([parse_caption("a cat")] * 5)
    )
    assert figures["size_entropy"] == pytest.approx(0.6 * math.log2(5) + 0.4 * math.log2(2.5))


@pytest.mark.parametrize("crossed", [False, True], ids=["first seen first", "second seen first"])
def test_entropy_of_the_order_of_two(crossed):
    caption = parse_caption("a cat and a dog")
    ways = [
        ((0.2, 0.5), (0.8, 0.5)),
        ((0.8, 0.5), (0.2, 0.5)),
        ((0.5, 0.2), (0.5, 0.8)),
        ((0.5, 0.8), (0.5, 0.2)),
    ]
    seen = reading([0] * 6, [0.0] * 6, [0.4] * 6)
    seen.emoji = torch.tensor([caption.emoji] * 6)
    seen.center = torch.tensor([*ways, ways[0], ways[0]])
    if crossed:
        seen.emoji, seen.center = seen.emoji.flip(1), seen.center.flip(1)
    seen.emoji[5, 0] += 1  # shows something else: does not count
    figures = free_attributes(seen, stated([caption] * 6))
    # left twice of five, the others once each
    assert figures["order_entropy"] == pytest.approx(0.6 * math.log2(5) + 0.4 * math.log2(2.5))
    # where the caption states the order, nothing is free
    left = free_attributes(seen, stated([parse_caption("a cat left of a dog")] * 6))
    assert math.isnan(left["order_entropy"])


@pytest.mark.filterwarnings("ignore:std")
def test_what_is_never_free_is_nan():
    columns = stated([parse_caption("a big cat on the left on a red background")] * 3)
    figures = free_attributes(reading([0] * 3, [0.2] * 3, [0.6] * 3), columns)
    assert all(math.isnan(value) for value in figures.values())


def test_alignment_by_what_captions_name():
    captions = ["a cat", "a big cat", "a dog", "a cat left of a dog", "a cat and an owl"]
    columns = stated([parse_caption(caption) for caption in captions])
    seen = reading([0] * 5, [0.5] * 5, [0.7] * 5)
    seen.emoji, seen.score = columns["emoji"].clone(), torch.ones(5, 2)
    seen.score[:3, 1] = 0  # one object
    seen.center[3:] = torch.tensor([[0.2, 0.5], [0.8, 0.5]])
    seen.emoji[2, 0] += 1  # no dog
    seen.emoji[4] = columns["emoji"][3]  # a dog in place of the owl
    assert alignment_by(seen, columns) == {
        "emoji": {"cat": pytest.approx(3 / 4), "dog": pytest.approx(1 / 2), "owl": 0.0},
        "size": {"big": 1.0},
        "relation": {"left of": 1.0, "and": 0.0},
    }


def test_captions_of_an_evaluation():
    sets = {name: evaluation_captions(name, 300) for name in ("selection", "test", "held-out")}
    assert [any(map(is_held_out, captions)) for captions in sets.values()] == [False, False, True]
    assert all(map(is_held_out, sets["held-out"]))
    assert sets["selection"] != sets["test"]
    assert evaluation_captions("test", 300) == sets["test"]


def test_too_few_pictures_are_refused():
    with pytest.raises(WadiError, match="--num-samples 255"):
        evaluate(EvaluateConfig(num_samples=255))


def test_a_student_takes_one_step():
    options = {"num_inference_steps": 25, "num_samples": 256, "device": "cpu"}
    with pytest.raises(WadiError, match="takes 1 step, not 25"):
        evaluate(EvaluateConfig(adapter=student_folder(), **options))


def test_a_folder_that_is_not_a_pipeline_is_told(tmp_path):
    with pytest.raises(WadiError, match=str(tmp_path)):
        evaluate(EvaluateConfig(pipeline=tmp_path, num_samples=256, num_inference_steps=25, device="cpu"))


def test_command(monkeypatch, tmp_path, capsys):
    """On pure noise: no caption is met, and the distance is far from the 0.19 of real pictures."""

    def noise(prompts, seeds):
        generator = torch.Generator().manual_seed(seeds[0])
        return torch.randint(0, 256, (len(prompts), 3, 64, 64), generator=generator).byte()

    monkeypatch.setattr(module, "evaluated_pipeline", lambda config: None)
    monkeypatch.setattr(module, "pipeline_generator", lambda *arguments: noise)
    out = tmp_path / "figures.json"
    options = ["--num-samples", "256", "--batch-size", "100", "--device", "cpu", "--out", str(out)]
    assert cli.main(["emoji", "evaluate", *options]) == 0
    written = json.loads(out.read_text())
    assert set(written["alignment_by"]) == {"emoji", "size", "relation"}
    assert set(written["alignment_by"]["relation"]) == set(RELATIONS)
    assert max(written["alignment_by"]["relation"].values()) < 0.1
    figures = written["figures"]
    assert figures["samples"] == 256
    assert figures["alignment"] < 0.05
    assert figures["precision"] < 0.05
    assert figures["frechet_distance"] > 10
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(figures)
    assert len({len(line) for line in lines}) == 1  # one table
    for line, (name, value) in zip(lines, figures.items(), strict=True):
        assert line.startswith(name.replace("_", " "))
        assert float(line.split()[-1]) == pytest.approx(value, abs=1e-4, nan_ok=True)
