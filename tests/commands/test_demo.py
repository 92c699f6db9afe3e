"""The demo, end to end, on a tiny teacher and with a judge that only counts."""

import json

import pytest
import torch

from tests.tiny import PROMPTS, tiny_pipeline
from wadi import cli, emoji
from wadi.commands import demo as command
from wadi.emoji import demo


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    teacher = tmp_path / "teacher"
    tiny_pipeline(model_max_length=77).save_pretrained(teacher)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    monkeypatch.setattr(emoji, "teacher_folder", lambda: teacher)
    monkeypatch.setattr(emoji, "prompts_file", lambda: prompts)
    judged = []

    def judge(images, captions, device):
        assert images.dtype == torch.uint8
        assert len(images) == len(captions)
        judged.append(images)
        return {"alignment": 0.25 * len(judged), "frechet_distance": 100.0 / len(judged)}

    monkeypatch.setattr(demo, "judge_images", judge)
    monkeypatch.setattr(command, "PROMPTS", demo.PROMPTS[:2])
    for module in (demo, command):
        monkeypatch.setattr(module, "STEPS", 2)
    return judged


def test_demo_trains_measures_and_reports(small_world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    arguments = ["--out", str(out), "--max-train-steps", "2", "--samples", "256", "--teacher-samples", "3"]
    assert cli.main(["demo", *arguments]) == 0
    before, after, teacher = small_world
    assert (len(before), len(after), len(teacher)) == (256, 256, 3)
    assert not torch.equal(before, after)
    figures = json.loads((out / "figures.json").read_text())
    assert [(f["name"], f["before"], f["after"], f["teacher"]) for f in figures] == [
        ("Alignment", 0.25, 0.5, 0.75),
        ("Fréchet distance", 100.0, 50.0, None),
    ]
    html = (out / "report.html").read_text()
    assert "Distilled with 2 updates: " in html
    assert "of 4 figures better than before" in html
    assert html.count("<img") == 3 * 2 * len(demo.SEEDS) + len(list((out / "samples").iterdir()))
    assert capsys.readouterr().out.endswith(f"report: {out / 'report.html'}\n")


def test_demo_refuses_too_few_samples(capsys):
    assert cli.main(["demo", "--samples", "10"]) == 2
    assert capsys.readouterr().err.startswith("wadi: error: --samples")
