"""The report of a run: complete, self-contained, and escaping what users wrote."""

import dataclasses
import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from tests.tiny import tiny_pixart
from wadi.cli import main
from wadi.commands.distill import parse
from wadi.distill.config import DistillConfig
from wadi.distill.figures import Figure
from wadi.distill.presets import PRESETS
from wadi.distill.report import (
    Comparison,
    before_after,
    command_line,
    report,
    write_report,
)
from wadi.errors import WadiError
from wadi.onestep import StudentPipeline, load_pipeline
from wadi.onestep.scheduler import fractions

PROMPTS = ("a red cat", "1 < 2 & <b>bold</b>")
FIGURES = [Figure("Alignment", 0.1, 0.78, 0.997, "higher", "Share of sentences that the picture obeys.")]


@pytest.fixture
def run(tmp_path, teacher_folder):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    config = DistillConfig.of(
        pretrained_model_name_or_path=str(teacher_folder),
        prompts="prompts.txt",
        validation_prompts=PROMPTS,
        validation_seeds=(0, 5),
        student_rank=4,
    )
    config.save(run / "config.yaml")
    rows = [
        {"step": s, "student_loss": 1 / s, "fake_loss": 0.5, "seconds": 1.0 * s} for s in range(10, 110, 10)
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
    grids = html.count("images of the student at step")
    assert grids == 4
    assert html.count("data:image/") == 2 * 2 * 3 + grids
    for step in (10, 40, 70, 100):
        assert f"images of the student at step {step}" in html
    assert "1 min 40 s" in html  # the last row's 100 seconds
    assert "0.78" in html
    assert "25 times faster" in html
    assert html.count("<svg") == 1
    assert "--student-rank 4" in html
    assert (
        html.count('type="checkbox"') == html.count("<img") == html.count("alt=")
    )  # each enlarges, each is told


def test_report_escapes_prompts(run, pictures):
    html = write_report(run, pictures).read_text()
    assert "<b>bold</b>" not in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html


def test_figures_are_kept_for_a_later_report(run, pictures):
    assert FIGURES[0].meaning not in write_report(run, pictures).read_text()
    write_report(run, pictures, FIGURES)
    assert FIGURES[0].meaning in write_report(run, pictures).read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"step": 1', "not valid JSON lines"),
        (None, "could not read"),
        ('{"step": 1, "seconds": 1}\n[1]', "line 2 is not"),
        ('{"student_loss": 1}', "line 1 is not"),
        ('{"step": 1, "seconds": "long"}', "line 1 is not"),
        ('{"step": 1, "seconds": NaN}', "line 1 is not"),
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
    ("row", "title"),
    [
        ({"step": 4}, "Distilled with 4 updates: none of 2 figures better than before"),
        ({"step": 1}, "Distilled with 1 update: none of 2 figures better than before"),
        ({"step": 1, "skipped_steps": 1}, "Distilled with 0 updates: none of 2 figures better than before"),
        ({"step": 30_000, "skipped_steps": 2}, "Distilled with 29,998 updates: none of 2 figures"),
    ],
)
def test_the_title_says_what_was_done(run, pictures, row, title):
    (run / "metrics.jsonl").write_text(json.dumps({"seconds": 2.0, **row}) + "\n")
    alike = dataclasses.replace(pictures, after=pictures.before)
    html = write_report(run, alike).read_text()
    assert html.count(title) == 2  # the tab and the headline
    assert ("skipped, because" in html) == ("skipped_steps" in row)
    assert "better</td>" in html
    assert ">better<" not in html


def test_samples_that_the_run_has_abandoned_or_never_made_are_not_shown(run, pictures):
    """A run that went on from an earlier checkpoint, for fewer steps than before."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    (run / "samples" / "step-last.png").write_bytes(b"")
    html = write_report(run, pictures).read_text()
    assert [step for step in range(10, 110, 10) if f"student at step {step}" in html] == [10, 20, 30]
    (run / "samples" / "step-000010.png").write_bytes(b"no image")
    with pytest.raises(WadiError, match=r"step-000010\.png: could not read the image"):
        write_report(run, pictures)


def test_a_run_without_samples_has_a_report(run, pictures):
    shutil.rmtree(run / "samples")
    html = write_report(run, pictures).read_text()
    assert "student at step" not in html
    assert "<svg" in html


@pytest.mark.parametrize(
    ("teacher", "student", "words"),
    [(2.5, 0.1, "25 times faster"), (1.3, 1.0, "1.3 times faster"), (1.0, 2.0, "2 times slower")],
)
def test_the_student_is_as_fast_as_it_was(run, pictures, teacher, student, words):
    timed = dataclasses.replace(pictures, teacher_seconds=teacher, student_seconds=student)
    assert words in write_report(run, timed).read_text()


def snippet(html, name):
    (text,) = re.findall(f'<pre id="{name}">(.*?)</pre>', html, re.DOTALL)
    return unescape(text)


@pytest.mark.parametrize(
    ("kind", "method", "dtype"),
    [("sd", "lorad", torch.float32), ("sd", "lorad", torch.float16), ("pixart", "full", torch.float32)],
)
def test_the_commands_run_anywhere_and_make_the_image_of_the_report(
    run, tmp_path, teacher_folder, monkeypatch, kind, method, dtype
):
    """Names and prompts that need quoting; another directory than the run's; files in half precision."""
    teacher = tmp_path / "teacher"
    pipeline = load_pipeline(teacher_folder) if kind == "sd" else tiny_pixart()
    pipeline.to(dtype).save_pretrained(teacher)
    prompts = ('it\'s "1 < 2" & a\\b\nc', "a red cat")
    config = DistillConfig.load(run / "config.yaml")
    changes = {"validation_prompts": prompts, "student_method": method}
    if method == "lorad":
        changes["student_adapter"] = "old & <new>"
    config.replace(pretrained_model_name_or_path=str(teacher), **changes).save(run / "config.yaml")
    run = run.rename(tmp_path / 'my run\'s "first"')
    StudentPipeline.from_pretrained(teacher, torch_dtype="auto").save_pretrained(run / "pipeline")
    monkeypatch.chdir(tmp_path)
    html = report(run.name, steps=2).read_text()
    student = StudentPipeline.from_pretrained(run / "pipeline")
    (expected,) = student(prompts[0], seed=0)
    assert ("from the adapter <code>old &amp; &lt;new&gt;" in html) == (method == "lorad")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    image = Path("image.png")
    wadi, *arguments = shlex.split(snippet(html, "shell"))
    for execute in (lambda: exec(snippet(html, "python"), {}), lambda: main(arguments)):
        execute()
        made = np.asarray(Image.open(image).convert("RGB"), int)
        assert np.abs(made - np.asarray(expected, int)).max() <= 1
        image.unlink()
    assert wadi == "wadi"
    assert "from diffusers import " + type(student.pipeline).__name__ in html


def test_the_commands_load_a_pipeline_in_the_precision_of_the_training(run, pictures):
    config = DistillConfig.load(run / "config.yaml")
    for precision, python, shell in (("no", "torch.float32", None), ("bf16", "torch.bfloat16", "bfloat16")):
        config.replace(mixed_precision=precision).save(run / "config.yaml")
        html = write_report(run, pictures).read_text()
        assert f"torch_dtype={python}" in snippet(html, "python")
        assert ("--dtype" in snippet(html, "shell")) == (shell is not None)
        assert shell is None or f"--dtype {shell}" in snippet(html, "shell")


def parsed(command):
    """The options that `wadi distill` would have."""
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("wadi", "distill")
    return parse(arguments)[0].values()


def test_the_command_repeats_the_run_beside_it(run, pictures):
    again = parsed(snippet(write_report(run, pictures).read_text(), "again"))
    config = DistillConfig.load(run / "config.yaml")
    assert again == config.values() | {"output_dir": f"{run}-again"}


@pytest.mark.parametrize("preset", ["emoji", "sd15", "sdxl", "pixart-1024-paper", "sd3-medium", "flux-dev"])
def test_the_command_line_gives_the_options_that_it_was_made_of(preset):
    config = PRESETS[preset].replace(
        pretrained_model_name_or_path="teacher",
        alpha_T_squared=None,
        prompts='it\'s my "file".txt',
        validation_prompts=("a\nb", "c $HOME `d`"),
        validation_seeds=(3,),
        gradient_checkpointing=not PRESETS[preset].run.gradient_checkpointing,
    )
    assert parsed(command_line(config)) == config.values()


def test_the_three_kinds_of_pictures_share_their_noise(teacher_folder):
    teacher, student = load_pipeline(teacher_folder), StudentPipeline.from_pretrained(teacher_folder)
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


def test_a_student_of_several_steps_is_shown_in_each(run, teacher_folder):
    student = StudentPipeline(load_pipeline(teacher_folder), steps=fractions(4))
    made = before_after(load_pipeline(teacher_folder), student, PROMPTS[:1], (0, 5), steps=2)
    assert list(made.more_steps) == [2, 4]
    (alone,) = student(PROMPTS[0], seed=5, num_inference_steps=4)
    assert np.abs(np.asarray(alone, int) - np.asarray(made.more_steps[4][0][1], int)).max() <= 1
    DistillConfig.load(run / "config.yaml").replace(student_steps=4).save(run / "config.yaml")
    html = write_report(run, made).read_text()
    assert "The student in 2 steps" in html
    assert "The student in 4 steps" in html
    assert "do the same in 1 to 4" in html
    assert "num_inference_steps=4" in html


def test_report_of_a_run_folder(run, teacher_folder):
    with pytest.raises(WadiError, match="no pipeline/"):
        report(run)
    StudentPipeline.from_pretrained(teacher_folder).save_pretrained(run / "pipeline")
    config = DistillConfig.load(run / "config.yaml")
    config = config.replace(validation_steps=0, validation_seeds=())  # the default's then
    config.save(run / "config.yaml")
    html = report(run, steps=2).read_text()
    assert "takes 2 steps" in html
    assert "guidance\n1.5" in html
    assert "seed 3" in html
    config.replace(validation_prompts=()).save(run / "config.yaml")
    with pytest.raises(WadiError, match="names no validation_prompts"):
        report(run)


def test_a_teacher_whose_last_timestep_is_pure_noise(teacher_folder):
    teacher = load_pipeline(teacher_folder)
    teacher.scheduler = DDIMScheduler.from_config(
        teacher.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    assert teacher.scheduler.alphas_cumprod[-1] == 0
    student = StudentPipeline(teacher, alpha_T_squared=0.0047)
    comparison = before_after(teacher, student, ["a cat"], [0], steps=4, guidance_scale=2.0)
    for (images,) in (comparison.before, comparison.after, comparison.teacher):
        assert np.ptp(np.asarray(images[0])) > 0  # NaN would be black
    assert np.array_equal(comparison.before[0][0], comparison.after[0][0])  # the student is not trained
