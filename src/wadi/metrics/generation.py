"""The images of an evaluation: what is made, with which settings, and how they are read again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from wadi.errors import WadiError
from wadi.files import read_json, replacing_file, write_json
from wadi.identity import adapter_digest, model_digest
from wadi.images import open_image
from wadi.metrics.captions import Chosen
from wadi.metrics.evaluate_config import EvaluateConfig
from wadi.onestep.arguments import size_arguments
from wadi.onestep.loading import guidance_arguments, stock_arguments
from wadi.onestep.output import tell_odd_output
from wadi.onestep.pipeline import load_for_steps
from wadi.onestep.scheduler import seed_steps
from wadi.progress import progress

SETTINGS_FILE, PICTURES = "settings.json", "pictures"
"""File and sub-folder of the folder of an evaluation."""

MADE_BY = (
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "resolution",
    "resize",
    "spread_samples",
    "dtype",
)
"""Options that decide the images, beside the content of the model and of its adapter."""


@dataclass(frozen=True)
class Task:
    """One image to make, and the name of its file."""

    file: str
    caption: str
    seed: int


def tasks_of(config: EvaluateConfig, chosen: Chosen) -> list[Task]:
    """An image of each caption, and then the images of which the diversity is measured."""
    tasks = [Task(f"{i:06d}.png", caption, config.seed + i) for i, caption in enumerate(chosen.captions)]
    first = config.seed + len(tasks)
    for i, caption in enumerate(chosen.captions[: config.spread_prompts]):
        for k in range(config.spread_samples):
            seed = first + i * config.spread_samples + k
            tasks.append(Task(f"spread-{i:06d}-{k:03d}.png", caption, seed))
    return tasks


def open_folder(config: EvaluateConfig, chosen: Chosen) -> None:
    """Open the folder and write settings.json, or check that the images there have the same settings.

    Raises:
        WadiError: the folder holds images of other settings, or may not or cannot be written.
    """
    config.output.open()
    # digests, because a model may have moved, and another model may be at the same path now
    settings = {
        "model": model_digest(config.model),
        "adapter": None if config.adapter is None else adapter_digest(config.adapter),
        **{name: asdict(config)[name] for name in MADE_BY},
        "choice_sha256": chosen.choice_sha256,
    }
    path = config.out / SETTINGS_FILE
    if path.exists():
        found = read_json(path)
        if found != settings:
            different = [k for k in settings if not isinstance(found, dict) or found.get(k) != settings[k]]
            raise WadiError(
                f"{path}: the images there were made with other settings ({', '.join(different)}); "
                "name another --out"
            )
        return
    if (config.out / PICTURES).exists():
        raise WadiError(f"{config.out}: holds images but no {SETTINGS_FILE}; name another --out")
    write_json(path, settings)


def generate(config: EvaluateConfig, tasks: Sequence[Task], state: PartialState) -> None:
    """Make the images of tasks that are not in the folder yet."""
    folder = config.out / PICTURES
    missing = [task for task in tasks if not (folder / task.file).exists()]
    if not missing:
        return
    pipeline = load_for_steps(
        config.model,
        config.adapter,
        config.num_inference_steps,
        getattr(torch, config.dtype),
        config.device or str(state.device),
        config.guidance_scale,
    )
    pipeline.set_progress_bar_config(disable=True)
    bar = progress(total=len(tasks), initial=len(tasks) - len(missing), desc="images", unit="image")
    with bar, torch.no_grad():
        for first in range(0, len(missing), config.batch_size):
            part = missing[first : first + config.batch_size]
            generators = [torch.Generator().manual_seed(task.seed) for task in part]
            seed_steps(pipeline, generators)
            made = pipeline(
                prompt=[task.caption for task in part],
                num_inference_steps=config.num_inference_steps,
                generator=generators,
                **stock_arguments(pipeline),
                **size_arguments(pipeline),
                **guidance_arguments(pipeline, config.guidance_scale),
            )
            tell_odd_output(made, [task.file for task in part])
            for task, image in zip(part, made.images, strict=True):
                with replacing_file(folder / task.file) as temporary:
                    resized(image, config).save(temporary, format="PNG")
            bar.update(len(part))


def resized(image: Image.Image, config: EvaluateConfig) -> Image.Image:
    """Crop the largest square in the middle, and resize it to the resolution of the options."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side))
    if config.resolution in (None, side):
        return image
    return image.resize((config.resolution, config.resolution), Image.Resampling[config.resize.upper()])


def image_batches(files: Sequence[Path], config: EvaluateConfig, what: str) -> Iterator[torch.Tensor]:
    """Read images (N, 3, H, W) uint8 in batches, cropped and resized."""
    starts = range(0, len(files), config.batch_size)
    for first in progress(starts, desc=what, unit="batch", leave=False):
        images = []
        for file in files[first : first + config.batch_size]:
            pixels = np.array(resized(open_image(file), config))
            images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        if len({image.shape for image in images}) > 1:
            raise WadiError(f"{files[first].parent}: holds images of several sizes; give --resolution")
        yield torch.stack(images)
