"""A sheet of images for a learned word: what the multi-step model and its student make of prompts with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from wadi.onestep import StudentPipeline, labelled_grid, load_embedding, load_pipeline
from wadi.onestep.arguments import own_size, seeded
from wadi.tasks.exemplars import cropped, read_images
from wadi.tasks.inversion import Inversion
from wadi.tasks.inversion_config import InvertConfig

COLUMNS = 5
"""Number of images for each prompt."""


def new_prompts(inversion: Inversion, prompts: Sequence[str] = (), count: int = 3) -> list[str]:
    """Prompts to try a learned word with.

    Args:
        inversion: holds the word and the captions from which it was learned.
        prompts: returned as they are if there are any. Without them, a subject gets its captions, and a
            relation gets objects of different captions in new pairs.
        count: most prompts that are returned.
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


def word_sheet(
    config: InvertConfig,
    embedding: Path,
    prompts: Sequence[str],
    adapter: str | None = None,
    num_inference_steps: int = 25,
    guidance_scale: float = 2.0,
) -> Image.Image:
    """Draw a row of exemplars, and for each prompt a row of the multi-step model and one of its student.

    Args:
        config: names the multi-step model, the exemplars, dtype, device and seed.
        embedding: file of the learned word.
        prompts: prompts of the images.
        adapter: folder or hub id of the student's adapter; without it there is no student.
        num_inference_steps: number of steps of the multi-step model.
        guidance_scale: guidance scale of the multi-step model.

    Raises:
        WadiError: the model, the adapter or the exemplars cannot be read.
    """
    dtype = getattr(torch, config.dtype)
    teacher = load_pipeline(config.model, dtype).to(config.device)
    load_embedding(teacher, embedding)
    teacher.set_progress_bar_config(disable=True)
    student = None
    if adapter is not None:
        student = StudentPipeline.from_pretrained(config.model, adapter, dtype, config.device)
        student.load_embedding(embedding)
    size = own_size(teacher)
    exemplars = read_images(config.examples)[:COLUMNS]
    rows = [("exemplars", [cropped(image, *size) for image in exemplars])]
    for prompt in prompts:
        made = teacher(
            [prompt] * COLUMNS,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=seeded(config.seed, COLUMNS),
        ).images
        rows.append((f"{prompt}: {num_inference_steps} steps", made))
        if student is not None:
            made = student(prompt, config.seed, num_images_per_prompt=COLUMNS)
            rows.append((f"{prompt}: 1 step", made))
    return labelled_grid(rows)
