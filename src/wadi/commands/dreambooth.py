"""`wadi dreambooth`: teach a subject, show it on teacher and student, and let the judge read the images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from wadi import emoji
from wadi.emoji.dreambooth import judged, with_built_in, word_of
from wadi.emoji.subject import distillation_prompts
from wadi.errors import WadiError
from wadi.files import read_json, write_json, write_text
from wadi.tasks.dreambooth import CHANGEABLE, DreamBoothConfig
from wadi.tasks.dreambooth import dreambooth as teach


@dataclass(frozen=True)
class SubjectConfig(DreamBoothConfig):
    """Teach a model a new subject from a few images (DreamBooth), with a LoRaD or LoRA adapter.

    Without --model the built-in teacher learns it, its student shows it in one step, and the judge reads the
    images of both. With another model give --class-prompt too.
    """

    instance_data_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGES")]
    """Folder of 4 to 8 images of the subject; for some see wadi emoji subject-examples."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["--out"])] = DreamBoothConfig.output_dir
    """Run folder: adapter/ (PEFT), pipeline/ (the model with the adapter merged), before-after.png."""
    pretrained_model_name_or_path: Annotated[str | None, tyro.conf.arg(aliases=["--model"])] = None
    """Multi-step model: a Stable Diffusion or PixArt-alpha folder, or a hub id; the built-in one if not
    given."""
    train_text_encoder: bool | None = None
    """Also train an adapter, of the same kind and rank, of CLIP's text encoder: if not given, only of the
    built-in model's."""
    samples: int = 40
    """Images of each kind that the judge reads of the built-in student, and a quarter of it of the teacher;
    0 for none."""


def dreambooth(config: SubjectConfig) -> dict[str, float]:
    """Teach a model a new subject from a few images, show it, and measure the built-in model.

    Returns:
        Shares of the images that the judge finds right, before and after; nothing of another model.

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
    figures = judged(config, run, config.samples)
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
