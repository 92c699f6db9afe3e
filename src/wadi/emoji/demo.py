"""The prompts that `wadi demo` shows, and the figures that it measures."""

from __future__ import annotations

from diffusers import DDIMScheduler, DiffusionPipeline

from wadi.distill.figures import Figure
from wadi.emoji import GUIDANCE_SCALE, STEPS
from wadi.emoji.evaluate import evaluation_captions, generate_in_batches, judge_images, pipeline_generator
from wadi.onestep import StudentPipeline

PROMPTS = (
    "a big panda on a red background",
    "a strawberry on a yellow background",
    "a butterfly",
    "a small rocket at the top",
    "a cup of coffee in the center on a blue background",
    "a cat left of a dog",
)
SEEDS = (0, 1, 2, 3)


def measure(
    teacher: DiffusionPipeline, student: StudentPipeline, samples: int, teacher_samples: int
) -> list[Figure]:
    """Let the judge read images of the test captions.

    Args:
        teacher: the multi-step pipeline.
        student: its student.
        samples: number of images in one step, of teacher and student each.
        teacher_samples: number of images of the teacher in 25 steps.
    """
    many_steps = StudentPipeline(teacher).pipeline  # a copy that shares the modules
    many_steps.scheduler = DDIMScheduler.from_config(teacher.scheduler.config, timestep_spacing="trailing")
    before = _judged(StudentPipeline(teacher).pipeline, samples, 1, 1.0)
    after = _judged(student.pipeline, samples, 1, 1.0)
    best = _judged(many_steps, teacher_samples, STEPS, GUIDANCE_SCALE)
    return [
        Figure(
            "Alignment",
            before["alignment"],
            after["alignment"],
            best["alignment"],
            "higher",
            "Share of the images that show everything their prompt says (objects, places, sizes, colours), "
            f"as a judge network reads them: {samples} images in one step, and {teacher_samples} images of "
            "the teacher in many steps.",
        ),
        Figure(
            "Fréchet distance",
            before["frechet_distance"],
            after["frechet_distance"],
            None,
            "lower",
            "Distance between the judge's features of these images and of real images; 0 is no difference. "
            f"It is over {samples} images.",
        ),
    ]


def _judged(pipeline: DiffusionPipeline, samples: int, steps: int, guidance_scale: float) -> dict[str, float]:
    captions = evaluation_captions("test", samples)
    generate = pipeline_generator(pipeline, steps, guidance_scale)
    images = generate_in_batches(generate, [caption.text for caption in captions], seed=0, batch_size=20)
    return judge_images(images, captions, device=str(pipeline.device))
