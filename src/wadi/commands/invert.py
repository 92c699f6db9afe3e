"""`wadi invert`: learn a word from images, write it, and show what teacher and student make of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import tyro

from wadi import emoji
from wadi.commands.teacher_file import TeacherFile
from wadi.device import chosen_device
from wadi.files import write_json
from wadi.onestep.arguments import whole_number
from wadi.outputs import Output
from wadi.tasks.inversion import EMBEDDING_FILE, Inversion
from wadi.tasks.inversion import invert as learn
from wadi.tasks.inversion_config import InvertConfig
from wadi.tasks.inversion_sheet import new_prompts, word_sheet

RESULT_FILE, PICTURES = "inversion.json", "pictures.png"


@dataclass(frozen=True)
class InvertOptions(InvertConfig):
    """Learn a word on a multi-step Stable Diffusion model, and show what it and its student make of it."""

    examples: tyro.conf.Positional[Path]
    adapter: str | None = None
    """Folder or hub id of the adapter of a student, which makes images too; if neither it nor --model is
    given, the student that comes with wadi."""
    teacher_file: TeacherFile = field(default_factory=TeacherFile)
    prompts: tuple[str, ...] = ()
    """Prompts of the images in pictures.png; if not given, objects of different captions in new pairs for a
    relation, and the captions for a subject."""
    num_inference_steps: int = 25
    """Number of steps of the multi-step model's images."""
    guidance_scale: float = 2.0
    """Guidance scale of the multi-step model's images."""
    overwrite: bool = False
    """Replace the folder if wadi invert wrote it and nothing else is in it."""


def invert(options: InvertOptions) -> None:
    """Learn what images share as a new word, for prompts of the multi-step model and of its student.

    The word is a subject, as in "a picture of a <S>" (textual inversion), or a relation between two objects,
    as in "a panda <R> a rocket" (ReVersion). The written word is read by wadi generate --embedding and by
    diffusers' load_textual_inversion. After Ctrl-C the word is written as it is then, without images.

    Raises:
        WadiError: as `wadi.tasks.inversion.invert`, or the folder may not or cannot be written.
        KeyboardInterrupt: after Ctrl-C, when the word is written.
    """
    if options.model is None:
        student = str(emoji.student_folder()) if options.adapter is None else options.adapter
        options = replace(options, model=str(emoji.teacher_folder()), adapter=student)
    whole_number("--num-inference-steps", options.num_inference_steps, 1)
    inputs = (options.examples, options.model, options.adapter, *options.teacher_file.inputs)
    output = Output(options.out, "invert", inputs, options.overwrite)
    output.check()
    options = replace(options, model=options.teacher_file.folder(options.model))
    options = replace(options, device=chosen_device(options.device))
    inversion = learn(options)
    if inversion.interrupted and not inversion.losses:
        raise KeyboardInterrupt
    prompts = new_prompts(inversion, options.prompts)
    with output.writing() as folder:
        inversion.save(folder)
        write_json(folder / RESULT_FILE, _facts(options, inversion))
        if not inversion.interrupted:
            steps, scale = options.num_inference_steps, options.guidance_scale
            sheet = word_sheet(options, folder / EMBEDDING_FILE, prompts, options.adapter, steps, scale)
            sheet.save(folder / PICTURES)
    written = f"{options.out / EMBEDDING_FILE}: {inversion.token}, {inversion.kind}"
    print(f"{written}, {len(inversion.losses)} updates")
    if inversion.interrupted:
        print(f"interrupted: {inversion.token} is written as it was then, without images")
        raise KeyboardInterrupt
    print(f"{options.out / PICTURES}: the exemplars, and images of prompts with the word")
    print(f'wadi generate "{prompts[0]}" --embedding {options.out}')


def _facts(options: InvertOptions, inversion: Inversion) -> dict:
    last = inversion.losses[-50:]
    return {
        "token": inversion.token,
        "kind": inversion.kind,
        "updates": len(inversion.losses),
        "interrupted": inversion.interrupted,
        "denoising_loss_of_the_last_updates": sum(last) / len(last),
        "options": asdict(options),
    }
