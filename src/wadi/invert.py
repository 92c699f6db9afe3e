"""`wadi invert`: learn a word from pictures, write it, and show what teacher and student make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import tyro
from PIL import Image

from wadi import emoji
from wadi.device import chosen_device
from wadi.errors import WadiError
from wadi.files import write_json
from wadi.onestep import OneStepPipeline, labelled_grid, load_embedding, load_pipeline
from wadi.onestep.arguments import own_size
from wadi.outputs import Output
from wadi.tasks.exemplars import cropped, read_exemplars
from wadi.tasks.inversion import EMBEDDING_FILE, Inversion, InvertConfig, invert

RESULT_FILE, PICTURES = "inversion.json", "pictures.png"
COLUMNS = 5
"""Pictures of each prompt."""


@dataclass(frozen=True)
class InvertOptions(InvertConfig):
    """Learn a word on a multi-step Stable Diffusion model, and show what it and its student make of it."""

    examples: tyro.conf.Positional[Path]
    adapter: str | None = None
    """Folder or hub id of a student's adapter, for the pictures; the student that comes with wadi if --model
    is not given."""
    prompts: tuple[str, ...] = ()
    """Of the pictures; objects of other captions in new pairs, or templates, if none are given."""
    num_inference_steps: int = 25
    """Of the multi-step model's pictures."""
    guidance_scale: float = 2.0
    """Of the multi-step model's pictures."""
    overwrite: bool = False
    """Replace the folder if wadi invert wrote it and nothing else is in it."""


def run(options: InvertOptions) -> None:
    """Learn what pictures share as a new word, for prompts of the multi-step model and of its student.

    A subject, as "a picture of a <S>" (textual inversion), or a relation between two objects, as
    "a panda <R> a rocket" (ReVersion). wadi generate --embedding and diffusers' load_textual_inversion read
    what is written. After Ctrl-C the word is written as it is by then, without pictures.

    Raises:
        WadiError: as `wadi.tasks.inversion.invert`, or the folder may not or cannot be written.
        KeyboardInterrupt: again, once that is written.
    """
    if options.model is None:
        student = str(emoji.student_folder()) if options.adapter is None else options.adapter
        options = replace(options, model=str(emoji.teacher_folder()), adapter=student)
    if options.num_inference_steps < 1:
        raise WadiError(f"--num-inference-steps {options.num_inference_steps}: must be at least 1")
    inputs = (options.examples, options.model, options.adapter)
    output = Output(options.out, "invert", inputs, options.overwrite)
    output.check()
    options = replace(options, device=chosen_device(options.device))
    names = [field.name for field in fields(InvertConfig)]
    inversion = invert(InvertConfig(**{name: getattr(options, name) for name in names}))
    if inversion.interrupted and not inversion.losses:
        raise KeyboardInterrupt
    with output.writing() as folder:
        inversion.save(folder)
        write_json(folder / RESULT_FILE, _facts(options, inversion))
        if not inversion.interrupted:
            pictures(options, inversion, folder / EMBEDDING_FILE).save(folder / PICTURES)
    written = f"{options.out / EMBEDDING_FILE}: {inversion.token}, {inversion.kind}"
    print(f"{written}, {len(inversion.losses)} updates")
    if inversion.interrupted:
        print(f"interrupted: {inversion.token} as it was then, without pictures")
        raise KeyboardInterrupt
    print(f"{options.out / PICTURES}: exemplars, and what the word gives")
    print(f'wadi generate "{new_prompts(inversion, options.prompts)[0]}" --embedding {options.out}')


def _facts(options: InvertOptions, inversion: Inversion) -> dict:
    last = inversion.losses[-50:]
    return {
        "token": inversion.token,
        "kind": inversion.kind,
        "updates": len(inversion.losses),
        "interrupted": inversion.interrupted,
        "denoising_loss_of_the_last_updates": sum(last) / len(last),
        "options": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()
        },
    }


def new_prompts(inversion: Inversion, prompts: Sequence[str] = (), count: int = 3) -> list[str]:
    """Prompts to try a word with: those given, or of a relation objects of other captions in new pairs.

    Args:
        inversion: holds the word and the captions it was learned from.
        prompts: returned if there are any.
        count: how many, at most.
    """
    if prompts:
        return list(prompts)
    captions = list(dict.fromkeys(inversion.captions))
    if inversion.kind == "subject":
        return captions[:count]
    parts = [caption.partition(f" {inversion.token} ") for caption in captions]
    found = [
        f"{parts[i][0]} {inversion.token} {parts[(i + shift) % len(parts)][2]}"
        for shift in range(1, len(parts))
        for i in range(len(parts))
        if parts[i][0] != parts[(i + shift) % len(parts)][2]
    ]
    fresh = [prompt for prompt in dict.fromkeys(found) if prompt not in captions]
    return (fresh or captions)[:count]


def pictures(options: InvertOptions, inversion: Inversion, embedding: Path) -> Image.Image:
    """A row of exemplars, then for each prompt one of the multi-step model and one of the student, if any."""
    dtype = getattr(torch, options.dtype)
    teacher = load_pipeline(options.model, dtype).to(options.device)
    load_embedding(teacher, embedding)
    teacher.set_progress_bar_config(disable=True)
    student = None
    if options.adapter is not None:
        student = OneStepPipeline.from_pretrained(options.model, options.adapter, dtype, options.device)
        student.load_embedding(embedding)
    size = own_size(teacher)
    exemplars = read_exemplars(options.examples)
    rows = [("exemplars", [cropped(image, *size) for image in exemplars.images[:COLUMNS]])]
    for prompt in new_prompts(inversion, options.prompts):
        made = teacher(
            [prompt] * COLUMNS,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=[torch.Generator().manual_seed(options.seed + i) for i in range(COLUMNS)],
        ).images
        rows.append((f"{prompt}: {options.num_inference_steps} steps", made))
        if student is not None:
            made = student(prompt, options.seed, num_images_per_prompt=COLUMNS)
            rows.append((f"{prompt}: 1 step", made))
    return labelled_grid(rows)
