"""`wadi demo`: train a one-step student of the built-in teacher in minutes, and write a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wadi import emoji
from wadi.device import chosen_device
from wadi.distill.presets import PRESETS
from wadi.distill.report import before_after, write_report
from wadi.distill.run import distill
from wadi.emoji.demo import GUIDANCE_SCALE, PROMPTS, SEEDS, STEPS, measure
from wadi.errors import WadiError
from wadi.onestep import StudentPipeline, load_pipeline


@dataclass
class DemoConfig:
    """Train a one-step student of the built-in teacher, measure it, and write a report."""

    out: Path = Path("demo")
    """Run folder; new or empty."""
    max_train_steps: int = PRESETS["emoji-cpu"].run.max_train_steps
    """Updates of the student."""
    seed: int = 0
    """Seed of the training."""
    samples: int = 500
    """Number of one-step images that the judge (a network) reads, from the teacher and from the student."""
    teacher_samples: int = 60
    """Number of 25-step images of the teacher that the judge reads; each takes as long as 50 in one step."""


def demo(config: DemoConfig) -> None:
    """Train a one-step student of the built-in teacher, measure it, and print the path of the report.

    Raises:
        WadiError: the folder is in use or cannot be written.
    """
    if config.samples < 256 or config.teacher_samples < 1:
        raise WadiError("--samples must be at least 256, and --teacher-samples at least 1")
    run = distill(
        PRESETS["emoji-cpu"].replace(
            pretrained_model_name_or_path=str(emoji.teacher_folder()),
            prompts=str(emoji.prompts_file()),
            output_dir=str(config.out),
            max_train_steps=config.max_train_steps,
            seed=config.seed,
            validation_prompts=PROMPTS,
            validation_seeds=SEEDS,
        )
    )
    device = chosen_device()
    teacher = load_pipeline(emoji.teacher_folder()).to(device)
    student = StudentPipeline.from_pretrained(run / "pipeline", device=device)
    figures = measure(teacher, student, config.samples, config.teacher_samples)
    path = write_report(run, before_after(teacher, student, PROMPTS, SEEDS, STEPS, GUIDANCE_SCALE), figures)
    for figure in figures:
        print(f"{figure.name}: {figure.before:.3g} before, {figure.after:.3g} after")
    print(f"student: {run / 'pipeline'}\nreport: {path}")
