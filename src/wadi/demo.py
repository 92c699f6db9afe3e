"""`wadi demo`: from the built-in teacher to a one-step student and a report, in minutes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from diffusers import DDIMScheduler, DiffusionPipeline

from wadi import emoji
from wadi.device import chosen_device
from wadi.distill import PRESETS, distill
from wadi.distill.report import Figure, before_after, write_report
from wadi.emoji.evaluate import evaluation_captions, generate_in_batches, judge_images, pipeline_generator
from wadi.errors import WadiError
from wadi.onestep import OneStepPipeline, load_pipeline

PROMPTS = (
    "a big panda on a red background",
    "a strawberry on a yellow background",
    "a butterfly",
    "a small rocket at the top",
    "a cup of coffee in the center on a blue background",
    "a cat left of a dog",
)
SEEDS = (0, 1, 2, 3)
STEPS, GUIDANCE_SCALE = 25, 2.0  # where the teacher's Frechet distance is lowest


@dataclass
class DemoConfig:
    """Distil the built-in teacher here and now, measure, and write a report."""

    out: Path = Path("demo")
    """Run folder; new or empty."""
    max_train_steps: int = PRESETS["emoji-cpu"].max_train_steps
    """Updates of the student."""
    seed: int = 0
    """Seed of the training."""
    samples: int = 500
    """Pictures that the judge reads, of teacher and student in one step."""
    teacher_samples: int = 60
    """Pictures that the judge reads of the teacher in 25 steps, each as dear as 50 one-step pictures."""


def demo(config: DemoConfig) -> None:
    """Distil, measure, write the report and print where it is.

    Raises:
        WadiError: the folder is in use or cannot be written.
    """
    if config.samples < 256 or config.teacher_samples < 1:
        raise WadiError("--samples, --teacher-samples: must be at least 256 and 1")
    run = distill(
        dataclasses.replace(
            PRESETS["emoji-cpu"],
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
    student = OneStepPipeline.from_pretrained(run / "pipeline", device=device)
    figures = measure(teacher, student, config.samples, config.teacher_samples)
    path = write_report(run, before_after(teacher, student, PROMPTS, SEEDS, STEPS, GUIDANCE_SCALE), figures)
    for figure in figures:
        print(f"{figure.name}: {figure.before:.3g} before, {figure.after:.3g} after")
    print(f"student: {run / 'pipeline'}\nreport: {path}")


def measure(
    teacher: DiffusionPipeline, student: OneStepPipeline, samples: int, teacher_samples: int
) -> list[Figure]:
    """Let the judge read pictures of the test captions.

    Args:
        samples: pictures of each kind in one step.
        teacher_samples: pictures of the teacher in 25 steps.
    """
    many_steps = OneStepPipeline(teacher).pipeline  # a copy that shares the modules
    many_steps.scheduler = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing")
    before = _judged(OneStepPipeline(teacher).pipeline, samples, 1, 1.0)
    after = _judged(student.pipeline, samples, 1, 1.0)
    best = _judged(many_steps, teacher_samples, STEPS, GUIDANCE_SCALE)
    return [
        Figure(
            "Alignment",
            before["alignment"],
            after["alignment"],
            best["alignment"],
            "higher",
            "Share of pictures that show everything their sentence says (what, where, size, colours), as "
            f"read by a judge network. {samples} pictures; {teacher_samples} of the original.",
        ),
        Figure(
            "Fréchet distance",
            before["frechet_distance"],
            after["frechet_distance"],
            None,
            "lower",
            "How far the pictures, all together, are from real ones in the eyes of the judge; 0 is no "
            f"difference. Over {samples} pictures.",
        ),
    ]


def _judged(pipeline: DiffusionPipeline, samples: int, steps: int, guidance_scale: float) -> dict[str, float]:
    captions = evaluation_captions("test", samples)
    generate = pipeline_generator(pipeline, steps, guidance_scale)
    images = generate_in_batches(generate, [caption.text for caption in captions], seed=0, batch_size=20)
    return judge_images(images, captions, device=str(pipeline.device))
