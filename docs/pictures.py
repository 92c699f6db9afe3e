"""Make the images of the README.

python docs/pictures.py                                                   # of what comes with wadi
python docs/pictures.py dit.png runs/dit-teacher runs/emoji-dit/adapter   # of another pair
"""

import sys
from pathlib import Path

from wadi import emoji
from wadi.distill.report import before_after
from wadi.onestep import StudentPipeline, labelled_grid, load_pipeline

PROMPTS = (
    "a big panda on the left on a red background",
    "a unicorn on a yellow background",
    "a small rocket at the top",
    "a butterfly",
    "a cup of coffee on a blue background",
    "a dog above a cat",
)


def main(name: str, teacher_folder: Path, adapter: Path) -> None:
    """Write docs/images/<name>: the teacher in one step, the student in one, the teacher in 25."""
    teacher = load_pipeline(teacher_folder)
    student = StudentPipeline.from_pretrained(teacher_folder, adapter=adapter)
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
    labelled_grid(rows, headings).save(folder / name)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ("before-after.png", emoji.teacher_folder(), emoji.student_folder())))
