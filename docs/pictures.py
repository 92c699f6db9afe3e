"""Make the pictures of the README: python docs/pictures.py"""

from pathlib import Path

from wadi import emoji
from wadi.distill.report import before_after
from wadi.onestep import OneStepPipeline, labelled_grid, load_pipeline

PROMPTS = (
    "a big panda on the left on a red background",
    "a unicorn on a yellow background",
    "a small rocket at the top",
    "a butterfly",
    "a cup of coffee on a blue background",
    "a dog above a cat",
)


def main() -> None:
    """Write docs/images/before-after.png."""
    teacher = load_pipeline(emoji.teacher_folder())
    student = OneStepPipeline.from_pretrained(emoji.teacher_folder(), adapter=emoji.student_folder())
    pictures = before_after(teacher, student, PROMPTS, seeds=(1, 2, 3), steps=25, guidance_scale=2.0)
    rows = [
        (prompt, [*before, *after, *reference])
        for prompt, before, after, reference in zip(
            PROMPTS, pictures.before, pictures.after, pictures.teacher, strict=True
        )
    ]
    headings = ("before: 1 step", "", "", "wadi student: 1 step", "", "", "teacher: 25 steps", "", "")
    folder = Path(__file__).parent / "images"
    folder.mkdir(exist_ok=True)
    labelled_grid(rows, headings).save(folder / "before-after.png")


if __name__ == "__main__":
    main()
