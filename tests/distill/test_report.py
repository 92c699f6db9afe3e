"""The report of a run: complete, self-contained, and escaping what users wrote."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from wadi.distill.config import DistillConfig
from wadi.distill.report import (
    Comparison,
    Figure,
    _duration,
    before_after,
    command_line,
    report,
    write_report,
)
from wadi.errors import WadiError
from wadi.onestep import OneStepPipeline, load_pipeline

PROMPTS = ("a red cat", "1 < 2 & <b>bold</b>")
FIGURES = [Figure("Alignment", 0.1, 0.78, 0.997, "higher", "Share of sentences that the picture obeys.")]


@pytest.fixture
def run(tmp_path, teacher_folder):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    config = DistillConfig(
        pretrained_model_name_or_path=str(teacher_folder),
        prompts="prompts.txt",
        validation_prompts=PROMPTS,
        validation_seeds=(0, 5),
        student_rank=4,
    )
    config.save(run / "config.yaml")
    rows = [
        {"step": s, "student_loss": 1 / s, "fake_loss": 0.5, "seconds": 2.0 * s} for s in range(10, 60, 10)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(10, 110, 10):
        Image.new("RGB", (300, 200), (step, 0, 0)).save(run / "samples" / f"step-{step:06d}.png")
    return run


@pytest.fixture
def pictures():
    def rows(colour):
        return [[Image.new("RGB", (16, 16), colour)] * 2] * 2

    return Comparison(PROMPTS, (0, 5), 25, 2.0, rows("red"), rows("green"), rows("blue"), 0.1, 2.5)


def test_report_is_complete_and_needs_nothing_else(run, pictures):
    html = write_report(run, pictures, FIGURES).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert "http-equiv" not in html
    assert "<script" not in html
    grids = html.count("samples at step")
    assert grids == 4
    assert html.count("data:image/") == 2 * 2 * 3 + grids
    for step in (10, 40, 70, 100):
        assert f"after {step}" in html
    assert "1 min 40 s" in html  # the last row's 100 seconds
    assert "0.78" in html
    assert "25 times faster" in html
    assert html.count("<svg") == 1
    assert "--student-rank 4" in html


def test_report_escapes_prompts(run, pictures):
    html = write_report(run, pictures).read_text()
    assert "<b>bold</b>" not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html


def test_figures_are_kept_for_a_later_report(run, pictures):
    assert "In figures" not in write_report(run, pictures).read_text()
    write_report(run, pictures, FIGURES)
    assert "Share of sentences that the picture obeys." in write_report(run, pictures).read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"step": 1', "not valid JSON lines"),
        (None, "could not read"),
        ('{"step": 1, "seconds": 1}\n[1]', "line 2 is not"),
        ('{"student_loss": 1}', "line 1 is not"),
        ('{"step": 1, "seconds": "long"}', "line 1 is not"),
    ],
)
def test_broken_metrics_are_one_line(run, pictures, content, message):
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(WadiError, match=message):
        write_report(run, pictures)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "content",
    [
        "3",
        '{"name": "Alignment"}',
        "[[1]]",
        '[{"name": "Alignment"}]',
        json.dumps([dataclasses.asdict(FIGURES[0]) | {"more": 1}]),
        json.dumps([dataclasses.asdict(FIGURES[0]) | {"before": "0.1"}]),
        json.dumps([dataclasses.asdict(FIGURES[0]) | {"better": ["higher"]}]),
    ],
)
def test_other_figures_are_one_line(run, pictures, content):
    (run / "figures.json").write_text(content)
    with pytest.raises(WadiError, match=r"figures\.json: not a list of figures, .*delete it") as error:
        write_report(run, pictures)
    assert "\n" not in str(error.value)
    assert not (run / "report.html").exists()


def test_a_run_that_skipped_every_logged_step_has_a_report(run, pictures):
    (run / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.0, "skipped_steps": 1}\n')
    assert write_report(run, pictures).read_text().count("<svg") == 1


def test_the_three_kinds_of_pictures_share_their_noise(teacher_folder):
    teacher, student = load_pipeline(teacher_folder), OneStepPipeline.from_pretrained(teacher_folder)
    scheduler = teacher.scheduler
    made = before_after(teacher, student, PROMPTS[:1], (0, 5), steps=2, guidance_scale=1.5)
    assert teacher.scheduler is scheduler
    # the student is the teacher itself here
    assert np.array_equal(np.asarray(made.before[0][1]), np.asarray(made.after[0][1]))
    # and its pictures are those of its seeds
    (alone,) = student(PROMPTS[0], seed=5)
    assert np.abs(np.asarray(alone, int) - np.asarray(made.after[0][1], int)).max() <= 1
    teacher.scheduler = DDIMScheduler.from_config(
        teacher.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    (stock,) = teacher(
        PROMPTS[0],
        num_inference_steps=2,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(5),
    ).images
    assert np.abs(np.asarray(stock, int) - np.asarray(made.teacher[0][1], int)).max() <= 1


def test_report_of_a_run_folder(run, teacher_folder):
    with pytest.raises(WadiError, match="no pipeline/"):
        report(run)
    OneStepPipeline.from_pretrained(teacher_folder).save_pretrained(run / "pipeline")
    html = report(run, steps=2).read_text()
    assert "2 steps became one" in html
    assert "guidance\n1.5" in html


def test_command_line_names_every_changed_option():
    config = DistillConfig(
        prompts="my prompts.txt", validation_prompts=("a b", "c"), gradient_checkpointing=True
    )
    assert command_line(config) == (
        "wadi distill --prompts 'my prompts.txt' --gradient-checkpointing --validation-prompts 'a b' c"
    )
    assert command_line(dataclasses.replace(config, resume_from_checkpoint="run")) == command_line(config)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0312, "0.031 s"), (42, "42 s"), (59.7, "1 min 0 s"), (340, "5 min 40 s"), (7300, "2 h 1 min")],
)
def test_durations(seconds, words):
    assert _duration(seconds) == words


def test_a_teacher_whose_last_timestep_is_pure_noise(teacher_folder):
    teacher = load_pipeline(teacher_folder)
    teacher.scheduler = DDIMScheduler.from_config(
        teacher.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    assert teacher.scheduler.alphas_cumprod[-1] == 0
    student = OneStepPipeline(teacher, alpha_T_squared=0.0047)
    comparison = before_after(teacher, student, ["a cat"], [0], steps=4, guidance_scale=2.0)
    for (images,) in (comparison.before, comparison.after, comparison.teacher):
        assert np.ptp(np.asarray(images[0])) > 0  # NaN would be black
    assert np.array_equal(comparison.before[0][0], comparison.after[0][0])  # the student is not trained
