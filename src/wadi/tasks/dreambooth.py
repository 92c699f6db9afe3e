"""A new subject from a few images: DreamBooth (Ruiz et al., arXiv 2208.12242) with a LoRaD or LoRA adapter.

The denoiser learns with its own denoising loss that the instance prompt ("a zwx dog") shows the subject. So
that it forgets nothing else, every batch holds as many class images, which the model itself made before the
training (prior preservation, eq. 2 of the paper):

    L = mean |p(x_t, t, c) - target|^2 + weight mean |p(x'_t', t', c') - target'|^2

Here (x, c) is an image of the subject and its prompt, and (x', c') is a class image and its prompt. The
target is the noise or the velocity, as the model predicts. The adapter can be stacked on the adapter of a
one-step student: the angles of two LoRaD adapters add up.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from wadi.backbones import BACKBONES
from wadi.distill.checkpoint import latest_checkpoint
from wadi.errors import WadiError
from wadi.files import read_json, replacing_file, write_json
from wadi.identity import files_digest, model_digest, refuse_other_inputs
from wadi.images import open_image
from wadi.onestep import StudentPipeline, labelled_grid, load_pipeline
from wadi.onestep.adapters import adapter_folder, merge_adapters, student_with
from wadi.onestep.arguments import seeded, size_arguments
from wadi.onestep.loading import guidance_arguments, prompt_reader, stock_arguments
from wadi.onestep.saving import save_pipeline
from wadi.onestep.student import check_teacher, network_of
from wadi.outputs import Output
from wadi.progress import progress
from wadi.prompts import Prompt, check_length, read_prompts
from wadi.tasks.dreambooth_config import CONFIG_FILE, INPUTS, DreamBoothConfig, saved_options
from wadi.tasks.dreambooth_training import DreamBooth, check_trainable
from wadi.tasks.exemplars import read_images

GUIDANCE_SCALE = 7.5
"""Guidance scale of the model's own images if none is given, as in diffusers."""
INPUTS_FILE = "inputs.json"
"""File of the run folder with digests of what the options in `INPUTS` name."""
GENERATED_AT_ONCE = 8
"""Class images that are made at once. It decides the last bits of the images, so it is not an option."""


def dreambooth(config: DreamBoothConfig) -> Path:
    """Teach a subject; write adapter/, pipeline/ and before-after.png into the run folder.

    Returns:
        The run folder.

    Raises:
        WadiError: a mistake of the user or a failure of the surroundings, in one line.
        SystemExit: code 130, after Ctrl-C; the run can be resumed.
    """
    config, checkpoint = resolve(config)
    run = config.output_dir
    images = read_images(config.instance_data_dir)
    inputs = _digests(config)
    if (run / INPUTS_FILE).exists():
        refuse_other_inputs(run, read_json(run / INPUTS_FILE), inputs, INPUTS)
    pipeline = _load(config)
    priors = class_prompts(config)
    _check_lengths(config, priors, pipeline)
    check_trainable(config, pipeline)
    if not (run / CONFIG_FILE).exists():
        run_output(config).open()
    write_json(run / INPUTS_FILE, inputs)
    write_json(run / CONFIG_FILE, asdict(config))
    painted = class_images(pipeline, priors, config, run / "class")
    training = DreamBooth(config, pipeline, images, painted, priors, inputs)
    if checkpoint is not None:
        training.load_checkpoint(checkpoint)
    if not training.train(run / "checkpoints"):
        print(f"Saved. Resume it with: wadi dreambooth {config.instance_data_dir} --out {run} --resume")
        raise SystemExit(130)
    save(training, run)
    sheet = before_after(config, config.validation_prompts or (config.instance_prompt, *priors[:1]))
    with replacing_file(run / "before-after.png") as temporary:
        sheet.save(temporary, format="PNG")
    return run


def save(training: DreamBooth, run: Path) -> None:
    """Write `run`/adapter (PEFT) and `run`/pipeline (the model with the adapter merged, diffusers)."""
    with part(run, "adapter").writing() as temporary:
        training.save(temporary)
    with part(run, "pipeline").writing() as temporary:
        model = training.config.pretrained_model_name_or_path
        save_pipeline(load_with_adapters(model, [run / "adapter"]), temporary)


def class_prompts(config: DreamBoothConfig) -> list[str]:
    """The prompt of each class image.

    Raises:
        WadiError: class images are wanted, and there is no prompt for them.
    """
    if not config.prior_loss_weight:
        return []
    if config.prior_prompts is not None:
        known = list(dict.fromkeys(prompt.text for prompt in read_prompts(str(config.prior_prompts))))
        order = np.random.default_rng([config.seed, 1]).permutation(len(known))
        return [known[order[i % len(known)]] for i in range(config.num_class_images)]
    if config.class_prompt is None:
        raise WadiError(
            '--class-prompt: say what the subject is, such as "a dog", for the class images; or name '
            "--prior-prompts, or give --prior-loss-weight 0"
        )
    return [config.class_prompt] * config.num_class_images


@torch.no_grad()
def class_images(
    pipeline: DiffusionPipeline, prompts: Sequence[str], config: DreamBoothConfig, folder: Path
) -> list[Image.Image]:
    """Make an image of each prompt with the model itself, and keep them in `folder` as PNG files.

    Image i has the seed `seed` + i. If the folder already holds the images of this run, they are read.
    """
    names = [f"{i:04d}.png" for i in range(len(prompts))]
    if prompts and not (folder / names[-1]).is_file():
        with part(folder.parent, folder.name).writing() as temporary:
            starts = range(0, len(prompts), GENERATED_AT_ONCE)
            for first in progress(starts, desc="class images", unit="batch"):
                chunk = list(prompts[first : first + GENERATED_AT_ONCE])
                images = _generate(pipeline, chunk, config, config.seed + first)
                for name, image in zip(names[first:], images, strict=False):
                    image.save(temporary / name)
    return [open_image(folder / name) for name in names]


def _generate(
    pipeline: DiffusionPipeline, prompts: list[str], config: DreamBoothConfig, seed: int
) -> list[Image.Image]:
    scale = GUIDANCE_SCALE if config.guidance_scale is None else config.guidance_scale
    return pipeline(
        prompt=prompts,
        num_inference_steps=config.num_inference_steps,
        generator=seeded(seed, len(prompts)),
        **guidance_arguments(pipeline, scale),
        **stock_arguments(pipeline),
        **size_arguments(pipeline),
    ).images


def load_with_adapters(
    model: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    torch_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> DiffusionPipeline:
    """Load a multi-step pipeline, and merge adapters into it in the order given.

    Raises:
        WadiError: something is missing or does not fit.
    """
    pipeline = load_pipeline(model, torch_dtype)
    merge_adapters(pipeline, adapters)
    return pipeline.to(device)


def before_after(config: DreamBoothConfig, prompts: Sequence[str]) -> Image.Image:
    """Show the model before and after the training, and also its student if one is named.

    There is a row for each prompt, with two images of each model, from the seeds `seed` and `seed` + 1.
    """
    model, dtype, columns, headings = config.pretrained_model_name_or_path, config.dtype, [], []
    trained = {"before": [], "after": [config.output_dir / "adapter"]}
    for when, adapters in trained.items():
        pipeline = load_with_adapters(model, adapters, dtype, config.device)
        pipeline.set_progress_bar_config(disable=True)
        columns.append([_generate(pipeline, [prompt] * 2, config, config.seed) for prompt in prompts])
        headings += [f"{when}, {config.num_inference_steps} steps", ""]
    for when, adapters in trained.items() if config.student_adapter is not None else ():
        adapters = [config.student_adapter, *adapters]
        student = StudentPipeline.from_pretrained(model, adapters, dtype, config.device)
        columns.append([student(p, seed=config.seed, num_images_per_prompt=2) for p in prompts])
        headings += [f"student {when}, 1 step", ""]
    return labelled_grid(
        [
            (prompt, [image for column in columns for image in column[row]])
            for row, prompt in enumerate(prompts)
        ],
        headings,
    )


def run_output(config: DreamBoothConfig) -> Output:
    """The rule for the run folder of a new run."""
    model, student = config.pretrained_model_name_or_path, config.student_adapter
    inputs = (config.instance_data_dir, model, config.prior_prompts, student)
    return Output(config.output_dir, "dreambooth", inputs, instead="go on with --resume")


def part(run: Path, name: str) -> Output:
    """A folder inside the run folder; a resumed run may replace what it wrote there."""
    return Output(run / name, "dreambooth", overwrite=True)


def resolve(config: DreamBoothConfig) -> tuple[DreamBoothConfig, Path | None]:
    """Check the run folder; if a run is resumed, find its options and its checkpoint.

    Returns:
        The options to train with, and the checkpoint to resume from, if any.

    Raises:
        WadiError: no model is named, the folder is in use, or there is no run with these options to resume.
    """
    if config.pretrained_model_name_or_path is None:
        raise WadiError("--pretrained-model-name-or-path: is required")
    run = config.output_dir
    if not config.resume:
        run_output(config).check()
        return config, None
    for name in ("adapter", "pipeline", "class"):
        part(run, name).check()
    return saved_options(config), latest_checkpoint(run / "checkpoints")


def _digests(config: DreamBoothConfig) -> dict[str, str | None]:
    """Digests of what the options in `INPUTS` name."""
    prompts = config.prior_prompts
    return {
        "pretrained_model_name_or_path": model_digest(config.pretrained_model_name_or_path),
        "instance_data_dir": files_digest(config.instance_data_dir),
        "prior_prompts": None if prompts is None else files_digest(prompts),
    }


def _load(config: DreamBoothConfig) -> DiffusionPipeline:
    pipeline = load_pipeline(config.pretrained_model_name_or_path, config.dtype)
    name = type(pipeline).__name__
    if name not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise WadiError(f"{config.pretrained_model_name_or_path}: holds a {name}; name one of {known}")
    check_teacher(config.pretrained_model_name_or_path, pipeline.scheduler, network_of(pipeline))
    if config.student_adapter is not None:
        student_with(pipeline, [adapter_folder(config.student_adapter)])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(config.device)


def _check_lengths(config: DreamBoothConfig, priors: list[str], pipeline: DiffusionPipeline) -> None:
    class_source = "--class-prompt" if config.prior_prompts is None else str(config.prior_prompts)
    sources = {
        "--instance-prompt": [config.instance_prompt],
        class_source: priors,
        "--validation-prompts": list(config.validation_prompts),
    }
    tokenizer, limit = prompt_reader(pipeline)
    for source, texts in sources.items():
        if texts:
            prompts = [Prompt(text, line) for line, text in enumerate(texts, 1)]
            check_length(prompts, tokenizer, source, limit=limit)
