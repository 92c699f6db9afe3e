"""What `wadi demo` shows and measures of the built-in teacher and of a student of it."""

from __future__ import annotations

from diffusers import DDIMScheduler, DiffusionPipeline

from wadi.distill.figures import Figure
from wadi.emoji.evaluate import evaluation_captions, generate_in_batches, judge_images, pipeline_generator
from wadi.onestep import OneStepPipeline

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


def measure(
    teacher: DiffusionPipeline, student: OneStepPipeline, samples: int, teacher_samples: int
) -> list[Figure]:
    """Let the judge read images of the test captions.

    Args:
        samples: images of each kind in one step.
        teacher_samples: images of the teacher in 25 steps.
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
            "Share of images that show everything their sentence says (what, where, size, colours), as "
            f"read by a judge network. {samples} images; {teacher_samples} of the original.",
        ),
        Figure(
            "Fréchet distance",
            before["frechet_distance"],
            after["frechet_distance"],
            None,
            "lower",
            "How far the images, all together, are from real ones in the eyes of the judge; 0 is no "
            f"difference. Over {samples} images.",
        ),
    ]


def _judged(pipeline: DiffusionPipeline, samples: int, steps: int, guidance_scale: float) -> dict[str, float]:
    captions = evaluation_captions("test", samples)
    generate = pipeline_generator(pipeline, steps, guidance_scale)
    images = generate_in_batches(generate, [caption.text for caption in captions], seed=0, batch_size=20)
    return judge_images(images, captions, device=str(pipeline.device))
