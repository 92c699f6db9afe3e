"""The experiment on larger pictures runs, and counts objects."""

import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from wadi.emoji import assets_folder
from wadi.emoji.evaluate import generate_in_batches, pipeline_generator
from wadi.emoji.judge import Judge
from wadi.files import read_json
from wadi.onestep.pipeline import load_for_steps

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import high_resolution  # noqa: E402


def test_figures_and_picture(tmp_path):
    out, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    options = ["--samples", "4", "--sizes", "96", "--damping", "0.5"]
    options += ["--teacher-samples", "1", "--device", "cpu"]
    command = [sys.executable, str(EXPERIMENTS / "high_resolution.py"), *options]
    subprocess.run(
        [*command, "--out", str(out), "--picture", str(picture)], capture_output=True, text=True, check=True
    )
    found = read_json(out)
    rows = [row for row in found["rows"] if row["steps"] == 1]
    ways = [(row["size"], row["redilated"], row["damping"]) for row in rows]
    assert ways == [(64, False, None), (96, False, None), (96, True, 0.0), (96, True, 0.5)]
    assert all(0 <= row["alignment"] <= 1 and row["objects"] >= 0 for row in rows)
    teacher = [(row["size"], row["redilated"]) for row in found["rows"] if row["steps"] == 25]
    assert teacher == [(64, False), (96, False), (96, True)]
    (line,) = found["summary"]
    assert line["student"] == rows[2]["alignment"]
    assert line["time_ratio"] > 2  # 50 predictions against one
    assert Image.open(picture).width > 3 * 96


def test_two_objects_are_counted_as_two():
    judge = Judge.load(assets_folder() / "judge.safetensors")
    pipeline = load_for_steps(assets_folder() / "teacher", assets_folder() / "student", 1)
    texts = ["a big panda on a red background"] * 4 + ["a panda left of an apple on a red background"] * 4
    images = generate_in_batches(pipeline_generator(pipeline, 1, 1.0), texts, seed=0, batch_size=8)
    counted = high_resolution.objects(judge, images.float() / 255)
    assert counted[:4].double().mean() < 1.5 < counted[4:].double().mean()
    assert high_resolution.objects(judge, torch.full((1, 3, 64, 64), 0.5)).item() == 0
