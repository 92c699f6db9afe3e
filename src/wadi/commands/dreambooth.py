"""`wadi dreambooth`: teach a subject, show it on teacher and student, and let the judge read the images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from wadi import emoji
from wadi.commands.teacher_file import DEFAULT, TeacherFile
from wadi.emoji.dreambooth import judged, with_built_in, word_of
from wadi.emoji.subject import distillation_prompts
from wadi.files import write_json, write_text
from wadi.onestep.arguments import whole_number
from wadi.tasks.dreambooth import dreambooth as teach
from wadi.tasks.dreambooth import run_output
from wadi.tasks.dreambooth_config import CONFIG_FILE, DreamBoothConfig, saved_options


@dataclass(frozen=True)
class SubjectConfig(DreamBoothConfig):
    """Teach a model a new subject from a few images (DreamBooth), with a LoRaD or LoRA adapter.

    Without --model, the built-in teacher learns the subject, its student shows it in one step, and a judge
    network measures the images of both. With another model, give --class-prompt too.
    """

    instance_data_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGES")]
    """Folder with 4 to 8 images of the subject; wadi emoji subject-examples writes such a folder."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["--out"])] = DreamBoothConfig.output_dir
    """Run folder: adapter/ (PEFT), pipeline/ (the model with the adapter merged), before-after.png."""
    pretrained_model_name_or_path: Annotated[str | None, tyro.conf.arg(aliases=["--model"])] = None
    """Folder, hub id or single .safetensors file of the multi-step model, of any kind that wadi distils; if
    not given, the built-in teacher."""
    teacher_file: TeacherFile = field(default_factory=TeacherFile)
    train_text_encoder: bool | None = None
    """Also train an adapter, of the same kind and rank, of CLIP's text encoder; if not given, only for the
    built-in model."""
    samples: int = 40
    """Number of images of each kind that the built-in student makes to be measured; the teacher makes a
    quarter of them. With 0 nothing is measured."""


def dreambooth(config: SubjectConfig) -> dict[str, float]:
    """Teach a model a new subject from a few images, show it, and measure the built-in model.

    Prints for the built-in model the shares of its images that are right, before and after the training.
    """
    whole_number("--samples", config.samples, 0)
    config = of_resumed_run(with_teacher_file(config))
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


def with_teacher_file(config: SubjectConfig) -> SubjectConfig:
    """The options with the folder that is made of a single file or of a model with a LoRA.

    The saved model of a run is this folder, so it comes before `of_resumed_run`.

    Raises:
        WadiError: the model cannot be read, or the run folder may not be written.
    """
    if config.teacher_file == DEFAULT and config.pretrained_model_name_or_path is None:
        return config
    if not config.resume:
        run_output(config).check()
    named = config.pretrained_model_name_or_path or emoji.teacher_folder()
    return replace(config, pretrained_model_name_or_path=config.teacher_file.folder(named))


def of_resumed_run(config: SubjectConfig) -> SubjectConfig:
    """The saved options of a resumed run, without a model if it is the built-in one; others as they are.

    Raises:
        WadiError: an option was given that is not the run's own.
    """
    if not config.resume or not (config.output_dir / CONFIG_FILE).is_file():
        return config
    config = saved_options(config)
    built_in = config.pretrained_model_name_or_path == str(emoji.teacher_folder())
    return replace(config, pretrained_model_name_or_path=None) if built_in else config
