"""The experiment on ControlNets: what it counts, and that it runs."""

from dataclasses import replace

import control
import pytest
import torch
from PIL import Image

from wadi.emoji import teacher_folder
from wadi.emoji.captions import is_held_out, stated
from wadi.emoji.judge import Reading
from wadi.emoji.scenes import sample_scenes
from wadi.emoji.train_controlnet import new_controlnet, open_captions, write_controlnet
from wadi.files import read_json
from wadi.onestep.loading import load_pipeline
from wadi.outputs import Output


def test_errors_of_place_and_size_whatever_the_order():
    scenes = sample_scenes(stated(open_captions(40, "errors")), torch.Generator().manual_seed(0))
    pair = scenes.emoji[:, 1] >= 0
    assert pair.any()
    assert not pair.all()
    nothing = torch.zeros(40)
    truth = Reading(scenes.emoji, nothing, scenes.center, scenes.size, scenes.background, nothing)
    assert all(error.abs().max() < 1e-4 for error in control.errors(truth, scenes))
    # Three pixels to the right and four down are five; sides two pixels longer.
    moved = replace(truth, center=scenes.center + torch.tensor([3.0, 4.0]) / 64, size=scenes.size + 2 / 64)
    crossed = replace(moved, center=moved.center.flip(1), size=moved.size.flip(1))
    for reading, which in ((moved, slice(None)), (crossed, pair)):
        place, size = control.errors(reading, scenes)
        torch.testing.assert_close(place[which], torch.full_like(place[which], 5.0), rtol=1e-4, atol=0)
        torch.testing.assert_close(size[which], torch.full_like(size[which], 2.0), rtol=1e-4, atol=0)


@pytest.fixture
def options(atlas, tmp_path):
    output = Output(tmp_path / "controlnet", "emoji train-controlnet")
    write_controlnet(output, new_controlnet(load_pipeline(teacher_folder())))
    return control.Options(
        samples=3,
        controlnet=tmp_path / "controlnet",
        scales=(0.0, 1.0),
        timed=1,
        atlas=atlas,
        device="cpu",
        out=tmp_path / "figures.json",
        picture=tmp_path / "picture.png",
    )


def test_scenes_are_held_out(options):
    captions, _, images = control.draw(options)
    assert all(map(is_held_out, captions))
    assert images.shape == (3, 3, 64, 64)
    assert control.edges_of(images).shape == (3, 64, 64)


def test_a_controlnet_that_does_nothing_changes_no_figure(options, monkeypatch, capsys):
    monkeypatch.setattr(control, "STEPS", 2)
    control.main(options)
    written = read_json(options.out)
    rows = {row.pop("name"): row for row in written["rows"]}
    assert list(rows) == [
        "teacher, scale 0",
        "teacher, scale 1",
        "student, scale 0",
        "student, scale 1",
        "autoencoder",
    ]
    for kind in ("teacher", "student"):
        without, steered = (rows[f"{kind}, scale {scale}"] for scale in (0, 1))
        for name in ("edge_f1", "objects", "background", "place_error", "size_error"):
            assert steered[name] == pytest.approx(without[name], abs=0.02), name
        assert without["seconds"] > 0
    assert rows["autoencoder"]["edge_f1"] > 0.8
    one, two = written["pairs"]
    assert one["scenes"] == two["scenes"] == sum(len(c.emoji) == 2 for c in control.draw(options)[0]) > 0
    assert one["edge_f1"] == pytest.approx(two["edge_f1"], abs=0.02)
    shown = capsys.readouterr().out
    assert "| teacher | 2 | 1 | " in shown
    assert "(1/1.0) |" in shown
    assert Image.open(options.picture).height > 3 * 128
