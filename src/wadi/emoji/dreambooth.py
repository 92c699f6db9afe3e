"""What `wadi dreambooth` does only for the built-in model: its default options, and what the judge reads."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.image_processor import VaeImageProcessor

from wadi import emoji
from wadi.emoji.captions import stated, with_article
from wadi.emoji.evaluate import evaluation_captions, generate_in_batches, pipeline_generator
from wadi.emoji.glyphs import NAMES
from wadi.emoji.judge import attributes_right, shipped_judge
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
from wadi.tasks.dreambooth import load_with_adapters
from wadi.tasks.dreambooth_config import DreamBoothConfig
from wadi.tasks.exemplars import cropped, read_images

Config = TypeVar("Config", bound=DreamBoothConfig)

LEARNING_RATES = {"lorad": 1e-2, "lora": 3e-3}
"""Learning rate of each method: the best of those that were tried on the built-in teacher, by the share of
images of the subject and of other prompts that were right (experiments/dreambooth.py, one subject, one
seed)."""
TRAIN_TEXT_ENCODER = True
"""Whether the text encoder is trained: in the same trials this was clearly better for LoRA, and hardly better
for LoRaD."""
VARIATIONS = 8
"""Variations by blur and noise of every image that the recogniser learns from."""
BEFORE = 6
"""Images that the student makes of the new word before it is learned, and of each other unknown word; the
recogniser learns to refuse them."""


def with_built_in(config: Config) -> Config:
    """Fill in the built-in teacher, student and prompts where none are given.

    Raises:
        WadiError: the instance prompt does not have the form of the captions of the emoji world.
    """
    word = word_of(config.instance_prompt)
    changes = {
        "pretrained_model_name_or_path": str(emoji.teacher_folder()),
        "guidance_scale": emoji.GUIDANCE_SCALE if config.guidance_scale is None else config.guidance_scale,
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
    """The name of the subject in the prompt "a NAME".

    Raises:
        WadiError: the prompt has another form.
    """
    match = re.fullmatch(r"an? (.+)", instance_prompt.strip())
    if match is None:
        raise WadiError(
            f'--instance-prompt {instance_prompt!r}: for the built-in model it must be "a" and a new word, '
            'such as "a zwx"'
        )
    return match[1]


def judged(config: DreamBoothConfig, run: Path, samples: int) -> dict[str, float]:
    """Measure teacher and student before and after: the shares of their images that are right.

    The recogniser of the subject learns from the images of the subject and from images of the student before
    it knows the subject: of everything else, and of the subject's word. It sees none of the judged images.

    Args:
        config: what `with_built_in` returned.
        run: folder of the finished run.
        samples: number of the student's images of each kind; the teacher makes a quarter of them.

    Returns:
        For teacher and student, before and after: the share of images of the subject in which it is
        recognised, in which size, place and background are right too, and of right images of other prompts.
    """
    judge = shipped_judge(config.device)
    generator = torch.Generator().manual_seed(config.seed)
    fitted = [cropped(image, IMAGE_SIZE, IMAGE_SIZE) for image in read_images(config.instance_data_dir)]
    subject = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(fitted))
    several = blemish(subject.repeat(VARIATIONS, 1, 1, 1), generator)
    word = word_of(config.instance_prompt)
    others = known_images(config.device, word).cpu()
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
        figures[f"{name}_subject_recognised"] = found["recognised"]
        figures[f"{name}_and_as_stated"] = found["all"]
        right = attributes_right(judge.read(images), stated(captions, config.device))["all"]
        figures[f"{name}_other_prompts_right"] = right.double().mean().item()
    return figures


def known_images(device: str, word: str) -> torch.Tensor:
    """Images (72 + 7 BEFORE, 3, 64, 64) float32 in [0, 1] that the built-in student makes before a training.

    They show each emoji that it knows, and what it makes of `word` and of the `UNSEEN_WORDS`.
    """
    pipeline = load_for_steps(emoji.teacher_folder(), emoji.student_folder(), device=device)
    prompts = [with_article(name) for name in NAMES] + unseen_captions(BEFORE, (word, *UNSEEN_WORDS))
    return generate_in_batches(pipeline_generator(pipeline, 1, 1.0), prompts, 0, 24).float() / 255
