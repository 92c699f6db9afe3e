"""What `wadi dreambooth` does for the built-in model alone: its options, and what the judge reads."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps

from wadi import emoji
from wadi.emoji.captions import stated, with_article
from wadi.emoji.evaluate import evaluation_captions, generate_in_batches, pipeline_generator
from wadi.emoji.glyphs import NAMES
from wadi.emoji.judge import Judge, attributes_right
from wadi.emoji.scenes import IMAGE_SIZE
from wadi.emoji.subject import (
    UNSEEN_WORDS,
    Recogniser,
    subject_captions,
    subject_figures,
    unseen_captions,
)
from wadi.emoji.train_judge import blemish
from wadi.errors import WadiError
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks.dreambooth import DreamBoothConfig, load_with_adapters, read_pictures

Config = TypeVar("Config", bound=DreamBoothConfig)

GUIDANCE_SCALE = 2.0
"""Guidance scale of the built-in teacher, where its Frechet distance is lowest."""
LEARNING_RATES = {"lorad": 1e-2, "lora": 3e-3}
"""The best of the rates that were tried on the built-in teacher. The score is the mean, over teacher and
stacked student, of subject and other prompts right (experiments/dreambooth.py, one subject, one seed)."""
TRAIN_TEXT_ENCODER = True
"""Chosen for the built-in model in the same trials: for LoRA clearly, for LoRaD by next to nothing."""
VARIATIONS = 8
"""Variations, by blur and noise, of every image that the recogniser learns from."""
BEFORE = 6
"""Images of the word before it means anything, and of each other unseen word, which the recogniser learns to
refuse."""


def with_built_in(config: Config) -> Config:
    """The options with the built-in teacher, student and prompts where none are given.

    Raises:
        WadiError: the instance prompt is not of the form that the captions of the emoji world have.
    """
    word = word_of(config.instance_prompt)
    changes = {
        "pretrained_model_name_or_path": str(emoji.teacher_folder()),
        "guidance_scale": GUIDANCE_SCALE if config.guidance_scale is None else config.guidance_scale,
        "learning_rate": config.learning_rate or LEARNING_RATES[config.method],
        "train_text_encoder": TRAIN_TEXT_ENCODER
        if config.train_text_encoder is None
        else config.train_text_encoder,
        "student_adapter": config.student_adapter or str(emoji.student_folder()),
        "validation_prompts": config.validation_prompts
        or (
            config.instance_prompt,
            f"a big {word} on a purple background",
            f"a small {word} on the right on a yellow background",
            "a cat on a blue background",
        ),
    }
    if config.class_prompt is None and config.prior_prompts is None:
        changes["prior_prompts"] = emoji.prompts_file()
    return dataclasses.replace(config, **changes)


def word_of(instance_prompt: str) -> str:
    """The subject's name in "a NAME"."""
    match = re.fullmatch(r"an? (.+)", instance_prompt.strip())
    if match is None:
        raise WadiError(
            f'--instance-prompt {instance_prompt!r}: for the built-in model it must be "a" and a new word, '
            'such as "a zwx"'
        )
    return match[1]


def judged(config: DreamBoothConfig, run: Path, samples: int) -> dict[str, float]:
    """Shares of images right, before and after, of student and teacher.

    The recogniser learns from the images of the subject, and from what the student makes before it knows
    the subject, of everything else and of the subject's word; of the images that are judged it sees none.

    Args:
        config: what `with_built_in` returned, on a device that is known.
        run: folder of the finished run.
        samples: images of each kind of the student, and a quarter of it of the teacher.
    """
    judge = Judge.load(emoji.assets_folder() / "judge.safetensors").to(config.device)
    generator = torch.Generator().manual_seed(config.seed)
    subject = _pixels(read_pictures(config.instance_data_dir))
    several = blemish(subject.repeat(VARIATIONS, 1, 1, 1), generator)
    word = word_of(config.instance_prompt)
    others = known_pictures(config.device, word).cpu()
    recogniser = Recogniser(judge, several, blemish(others, generator))
    figures = {}
    cases = (
        ("teacher_before", [], config.num_inference_steps),
        ("teacher", [run / "adapter"], config.num_inference_steps),
        ("student_before", [config.student_adapter], 1),
        ("student", [config.student_adapter, run / "adapter"], 1),
    )
    for name, adapters, steps in cases:
        student = config.student_adapter in adapters
        load = load_for_steps if student else load_with_adapters
        pipeline = load(emoji.teacher_folder(), adapters, device=config.device)
        generate = pipeline_generator(pipeline, steps, 1.0 if student else config.guidance_scale)
        count = samples if student else -(-samples // 4)
        texts, columns = subject_captions(count, "command", word)
        found = subject_figures(recogniser, generate_in_batches(generate, texts, 0, 20), columns)
        captions = evaluation_captions("test", count)
        images = generate_in_batches(generate, [caption.text for caption in captions], 0, 20)
        columns = {key: column.to(config.device) for key, column in stated(captions).items()}
        figures[f"{name}_subject_recognised"] = found["recognised"]
        figures[f"{name}_and_as_stated"] = found["all"]
        right = attributes_right(judge.read(images), columns)["all"]
        figures[f"{name}_other_prompts_right"] = right.double().mean().item()
    return figures


def known_pictures(device: str, word: str) -> torch.Tensor:
    """(72 + 7 BEFORE, 3, 64, 64) float32 in [0, 1]: each emoji that the built-in student knows, and what it
    makes of words that it does not know."""
    pipeline = load_for_steps(emoji.teacher_folder(), emoji.student_folder(), device=device)
    prompts = [with_article(name) for name in NAMES] + unseen_captions(BEFORE, (word, *UNSEEN_WORDS))
    return generate_in_batches(pipeline_generator(pipeline, 1, 1.0), prompts, 0, 24).float() / 255


def _pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """(N, 3, 64, 64) float32 in [0, 1]."""
    fitted = [ImageOps.fit(p, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS) for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(p) for p in fitted])).permute(0, 3, 1, 2).float() / 255
