"""The experiment on subjects: it measures one smallest training, and the page shows its committed results."""

import dataclasses
from pathlib import Path

import dreambooth as experiment
import pytest
import torch
from PIL import Image

from tests.emoji.cases import synthetic_atlas
from wadi.errors import WadiError
from wadi.files import load_tensors, read_json, save_tensors

SHAPE = {"subjects": len(experiment.SUBJECTS), "known_decoys": 1, "new_decoys": 1}


@pytest.fixture
def options(tmp_path):
    glyphs = {name: torch.full((n, 4, 96, 96), 200, dtype=torch.uint8) for name, n in SHAPE.items()}
    save_tensors(tmp_path / "glyphs.safetensors", {"atlas": synthetic_atlas(), **glyphs})
    return experiment.Options(
        glyphs=tmp_path / "glyphs.safetensors",
        rank=4,
        max_train_steps=1,
        train_batch_size=1,
        num_class_images=1,
        distill_train_steps=1,
        distill_steps=1,
        distill_batch_size=1,
        subject_samples=2,
        samples=2,
        scenes=2,
        workers=1,
        runs=tmp_path / "runs",
        results=tmp_path / "results",
        picture=tmp_path / "picture.jpg",
        device="cpu",
    )


def test_one_training_is_measured_in_every_way(options, monkeypatch):
    monkeypatch.setattr(experiment, "STEPS", 1)
    run = experiment.Run("hedgehog", "lora", 1e-3, False, 1)
    (result,) = experiment.run_all([run], options, final=True)
    assert set(result["figures"]) == set(experiment.WAYS)
    for figures in result["figures"].values():
        assert all(0 <= figures[name] <= 1 for name in ("recognised", "all", "others", "subject_elsewhere"))
    shown = load_tensors(options.runs / f"{run.name}.safetensors")
    assert all(shown[way].shape == (2, 3, 64, 64) for way in experiment.WAYS)
    written = options.results / f"{run.name}.json"
    assert read_json(written)["header"].startswith("CPU, torch ")
    before = written.stat().st_mtime_ns
    experiment.run_all([run], options, final=True)  # what is there is not run again
    assert written.stat().st_mtime_ns == before
    with pytest.raises(WadiError, match="with other options"):
        experiment.run_all([run], dataclasses.replace(options, samples=3), final=True)


def test_the_student_is_distilled_on(options, monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "STEPS", 1)
    run = experiment.Run("hedgehog", "lorad", 1e-2, True, 2)
    result = experiment.distill_on(run, options)
    assert result == read_json(options.results / "distilled-on" / "hedgehog.json")
    assert set(result["figures"]) == set(experiment.DISTILLED)
    assert Image.open(tmp_path / "picture-hedgehog.jpg").width > 4 * 128
    assert "hedgehog, LoRaD, seed 2; 1 updates of the subject" in experiment.distilled_table([result])
    with pytest.raises(WadiError, match="--distill-on dodo: known are crab"):
        experiment.main(dataclasses.replace(options, distill_on=("dodo",)))


def test_the_committed_results_give_the_file(tmp_path, monkeypatch, capsys):
    def train(*_):
        raise AssertionError("something was trained again")

    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr(experiment, "read_glyphs", train)
    docs = Path(__file__).parents[2] / "docs" / "results"
    out = tmp_path / "dreambooth.json"
    page = tmp_path / "page.md"
    page.write_text((docs.parent / "uses" / "dreambooth.md").read_text())
    experiment.main(
        experiment.Options(
            page=page, results=docs / "dreambooth", out=out, runs=tmp_path, picture=tmp_path / "picture.png"
        )
    )
    assert out.read_bytes() == (docs / "dreambooth.json").read_bytes()
    assert "lacks the pictures" in capsys.readouterr().err
    page.write_text("nothing")
    with pytest.raises(WadiError, match="has no <!-- table: alone -->"):
        experiment.write_page(page, read_json(out))


def test_the_results_on_the_page_are_those_of_the_file():
    docs = Path(__file__).parents[2] / "docs"
    page = docs / "uses" / "dreambooth.md"
    blocks = experiment.tables(read_json(docs / "results" / "dreambooth.json"))
    text = page.read_text(encoding="utf-8")
    places = experiment.find_tables(text, page, tuple(blocks))
    assert {name: text[slice(*place)].rstrip() for name, place in places.items()} == blocks
