"""`wadi dreambooth`: teach a subject, show it on teacher and student, and let the judge read the pictures."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
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
    distillation_prompts,
    subject_captions,
    subject_figures,
    unseen_captions,
)
from wadi.emoji.train_judge import blemish
from wadi.errors import WadiError
from wadi.files import read_json, write_json, write_text
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks.dreambooth import CHANGEABLE, DreamBoothConfig, load_with_adapters, read_pictures
from wadi.tasks.dreambooth import dreambooth as teach

GUIDANCE_SCALE = 2.0
"""Of the built-in teacher's pictures, where its Frechet distance is lowest."""
LEARNING_RATES = {"lorad": 1e-2, "lora": 3e-3}
"""Of those tried on the built-in teacher, with the best score: the mean, over teacher and stacked student, of
subject and other prompts right (benchmarks/dreambooth.py, one subject, one seed)."""
TRAIN_TEXT_ENCODER = True
"""Of the built-in model, chosen in the same trials: for LoRA clearly, for LoRaD by next to nothing."""
VARIATIONS = 8
"""Of every picture that the recogniser learns from: blur and noise."""
BEFORE = 6
"""Images of the word before it means anything, and of each other unseen word, which the recogniser learns to
refuse."""


@dataclass(frozen=True)
class SubjectConfig(DreamBoothConfig):
    """Teach a model a new subject from a few pictures (DreamBooth), with a LoRaD or LoRA adapter.

    Without --model the built-in teacher learns it, its student shows it in one step, and the judge reads the
    pictures of both. With another model give --class-prompt too.
    """

    instance_data_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PICTURES")]
    """Folder of 4 to 8 pictures of the subject; for some see wadi emoji subject-examples."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["--out"])] = DreamBoothConfig.output_dir
    """Run folder: adapter/ (PEFT), pipeline/ (the model with the adapter merged), before-after.png."""
    pretrained_model_name_or_path: Annotated[str | None, tyro.conf.arg(aliases=["--model"])] = None
    """Multi-step model: a Stable Diffusion or PixArt-alpha folder, or a hub id; the built-in one if not
    given."""
    train_text_encoder: bool | None = None
    """Also train an adapter, of the same kind and rank, of CLIP's text encoder: if not given, only of the
    built-in model's."""
    samples: int = 40
    """Pictures of each kind that the judge reads of the built-in student, and a quarter of it of the teacher;
    0 for none."""


def dreambooth(config: SubjectConfig) -> dict[str, float]:
    """Teach a model a new subject from a few pictures, show it, and measure the built-in model.

    Returns:
        Shares of the pictures that the judge finds right, before and after; nothing of another model.

    Raises:
        WadiError: as `wadi.tasks.dreambooth.dreambooth`, or an instance prompt that the emoji world lacks.
    """
    if config.samples < 0:
        raise WadiError("--samples: must be zero or more")
    config = of_resumed_run(config)
    built_in = config.pretrained_model_name_or_path is None
    if built_in:
        config = with_built_in(config)
    run = teach(config)
    print(f"adapter: {run / 'adapter'} (PEFT), model with it: {run / 'pipeline'} (diffusers)")
    print(f"before and after: {run / 'before-after.png'}")
    if not built_in:
        return {}
    prompts = run / "prompts.txt"
    write_text(prompts, "\n".join(distillation_prompts(word_of(config.instance_prompt))) + "\n")
    print(f'in one step: wadi generate "{config.instance_prompt}" --subject-adapter {run / "adapter"}')
    print(
        f"or distil on: wadi distill --preset emoji-cpu --student-learning-rate 1e-3 "
        f"--teacher {run / 'pipeline'} --prompts {prompts} "
        f"--student-adapter {config.student_adapter} --out {run / 'distilled'}"
    )
    if not config.samples:
        return {}
    figures = judged(config, run)
    write_json(run / "figures.json", figures)
    return figures


def of_resumed_run(config: SubjectConfig) -> SubjectConfig:
    """The options of a resumed run where none are given; its model stays None if it is the built-in one."""
    path = config.output_dir / "config.json"
    saved = read_json(path) if config.resume and path.is_file() else None
    if not isinstance(saved, dict):
        return config
    defaults = {field.name: field.default for field in dataclasses.fields(SubjectConfig)}
    changes = {
        field.name: saved[field.name]
        for field in dataclasses.fields(DreamBoothConfig)
        if field.name in saved
        and field.name not in CHANGEABLE
        and getattr(config, field.name) == defaults[field.name]
    }
    if changes.get("pretrained_model_name_or_path") == str(emoji.teacher_folder()):
        del changes["pretrained_model_name_or_path"]
    return dataclasses.replace(config, **changes)


def with_built_in(config: SubjectConfig) -> SubjectConfig:
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


def judged(config: SubjectConfig, run: Path) -> dict[str, float]:
    """Shares of pictures right, before and after, of student and teacher.

    The recogniser learns from the pictures of the subject, and from what the student makes before it knows
    the subject, of everything else and of the subject's word; of the pictures that are judged it sees none.
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
        count = config.samples if student else -(-config.samples // 4)
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
