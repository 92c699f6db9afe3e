"""`wadi emoji evaluate`: what the judge reads in the images of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline

from wadi.emoji import assets_folder, teacher_folder
from wadi.emoji.captions import COLOURS, RELATIONS, SIZES, Caption, sample_captions, stated
from wadi.emoji.glyphs import NAMES, load_atlas
from wadi.emoji.judge import NUM_FEATURES, Reading, attributes_right, place_in_room, shipped_judge
from wadi.emoji.scenes import FREE, IMAGE_SIZE, draw, sample_scenes, to_bytes
from wadi.errors import WadiError
from wadi.files import load_tensors, write_json
from wadi.metrics import (
    entropy_bits,
    feature_statistics,
    fewest_images,
    frechet_distance,
    precision_recall,
)
from wadi.onestep.loading import stock_arguments
from wadi.onestep.pipeline import load_for_steps
from wadi.onestep.scheduler import seed_steps
from wadi.outputs import Output
from wadi.progress import progress

Generate = Callable[[list[str], list[int]], torch.Tensor]
"""Makes images (N, 3, 64, 64) uint8 of N prompts with N seeds."""


@dataclass
class EvaluateConfig:
    """Score a pipeline on captions of the emoji world with the judge."""

    pipeline: Path | None = None
    """Pipeline folder; if not given, the built-in teacher."""
    adapter: Path | None = None
    """Folder of a student's LoRaD adapter, which is merged into the pipeline."""
    num_inference_steps: int = 1
    """Number of denoising steps. With 1, and with a student, the student's scheduler is used."""
    guidance_scale: float = 1.0
    """Guidance scale of a multi-step pipeline. A student, and one step, are not guided."""
    num_samples: int = 10_000
    """Number of images."""
    prompts: Literal["selection", "test", "held-out"] = "test"
    """Captions of the images. Settings are chosen on `selection` and reported on `test`; `held-out` states
    combinations that training never showed."""
    seed: int = 0
    """Seed of the first image; the next images have the next seeds."""
    batch_size: int = 250
    """Images that are made at once; does not change the result."""
    real: bool = False
    """Score freshly drawn images instead of a pipeline's, to see what the judge itself misreads."""
    atlas: Path | None = None
    """Atlas file of `wadi emoji atlas` for --real; if it is not given, the emoji are drawn from the font."""
    out: Path | None = None
    """JSON file for the figures."""
    overwrite: bool = False
    """Replace that file if it exists."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to compute on, such as cpu or cuda:1."""


def judge_images(images: torch.Tensor, captions: Sequence[Caption], device: str = "cpu") -> dict[str, float]:
    """Score images against their captions and against real images.

    Args:
        images: (N, 3, 64, 64) uint8.
        captions: their N captions.
        device: device of the judge.

    Returns:
        ``frechet_distance``, ``precision``, ``recall``, ``alignment`` and its parts, and the diversity of
        what the captions leave free: see :func:`free_attributes`.
    """
    reference = load_tensors(assets_folder() / "reference.safetensors")
    return reading_figures(shipped_judge(device).read(images), stated(captions, device), reference)


def reading_figures(
    reading: Reading, columns: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Compute the figures of :func:`judge_images` from what the judge has read.

    Args:
        reading: of N images.
        columns: what their captions state (:func:`wadi.emoji.captions.stated`), on the reading's device.
        reference: tensors of reference.safetensors.
    """
    right = {name: value.double().mean().item() for name, value in attributes_right(reading, columns).items()}
    samples = len(reading.features)
    count = min(samples, len(reference["features"]))
    real = reference["features"][:count].to(reading.features.device)
    precision, recall = precision_recall(real, reading.features[:count])
    return {
        "samples": samples,
        "frechet_distance": frechet_distance(reference, feature_statistics(reading.features)),
        "precision": precision,
        "recall": recall,
        "alignment": right.pop("all"),
        **{f"alignment_{name}": value for name, value in right.items()},
        **free_attributes(reading, columns),
    }


def alignment_by(reading: Reading, columns: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Share of the images that are right in everything, by what their captions name.

    Returns:
        ``emoji``, ``size`` and ``relation``, each with a share for every name that some caption has; a
        caption of two emoji counts for both.
    """
    right = attributes_right(reading, columns)["all"].double()
    names = {"emoji": NAMES, "size": SIZES, "relation": RELATIONS}
    shares: dict[str, dict[str, float]] = {}
    for kind, values in names.items():
        stated_values = columns[kind].view(len(right), -1)
        has = {name: (stated_values == index).any(1) for index, name in enumerate(values)}
        shares[kind] = {name: right[mask].mean().item() for name, mask in has.items() if mask.any()}
    return shares


def free_attributes(reading: Reading, columns: dict[str, torch.Tensor]) -> dict[str, float]:
    """Diversity of what the captions leave free, which a collapsed student loses first.

    Returns:
        Entropies in bits, each over the images whose caption leaves that attribute free:

        - ``background_entropy``: ten colours; 3.32 if uniform, as in the data;
        - ``place_entropy``: nine cells of the room that a single object has; 3.17 if uniform;
        - ``size_entropy``: four ranges between the smallest and the biggest single object; 2 if uniform;
        - ``order_entropy``: whether A is left of, right of, above or below B in "A and B", over the images
          that show both; 2 if uniform;

        and ``place_spread`` and ``size_spread``, standard deviations in pixels of the same places and sizes.
        A figure is nan where no image counts.
    """
    single = columns["emoji"][:, 1] < 0
    anywhere = single & (columns["place"] < 0)
    any_size = single & (columns["size"] < 0)
    colours = reading.background[columns["background"] < 0]
    center, size = reading.center[anywhere, 0], reading.size[any_size, 0]
    return {
        "background_entropy": _entropy(colours, len(COLOURS)),
        "place_entropy": _entropy(_cells(center, reading.size[anywhere, 0]), 9),
        "size_entropy": _entropy(_bins((size - FREE[0]) / (FREE[1] - FREE[0]), 4), 4),
        "order_entropy": _entropy(_orders(reading, columns), 4),
        "place_spread": IMAGE_SIZE * center.std(0).mean().item(),
        "size_spread": IMAGE_SIZE * size.std().item(),
    }


def _entropy(classes: torch.Tensor, num_classes: int) -> float:
    return entropy_bits(classes, num_classes) if len(classes) else float("nan")


def _bins(value: torch.Tensor, count: int) -> torch.Tensor:
    """Which of `count` equal ranges of [0, 1] holds each value (N,); the nearest one for values outside."""
    return (value * count).floor().long().clamp(0, count - 1)


def _cells(center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Which of 3 x 3 cells of its room (`place_in_room`) an object is in."""
    column, row = _bins((place_in_room(center, size) + 1) / 2, 3).unbind(1)
    return 3 * row + column


def _orders(reading: Reading, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where the first object of "A and B" is, seen from the second: left, right, above or below."""
    both, center, _ = reading.found(columns["emoji"])
    center = center[both & (columns["relation"] == RELATIONS.index("and"))]
    dx, dy = (center[:, 0] - center[:, 1]).unbind(1)
    return torch.where(dx.abs() > dy.abs(), (dx > 0).long(), 2 + (dy > 0).long())


def evaluation_captions(prompts: str, count: int) -> list[Caption]:
    """The captions of an evaluation, the same in every run and on every machine."""
    if prompts == "held-out":
        return sample_captions(count, "test", split="held-out")
    return sample_captions(count, prompts)


@torch.no_grad()
def generate_in_batches(generate: Generate, prompts: list[str], seed: int, batch_size: int) -> torch.Tensor:
    """Images (N, 3, 64, 64) uint8 on the CPU; image i has the seed `seed` + i, whatever the batch size."""
    batches = []
    for first in progress(range(0, len(prompts), batch_size), desc="images", unit="batch"):
        part = prompts[first : first + batch_size]
        batches.append(generate(part, [seed + first + i for i in range(len(part))]).cpu())
    return torch.cat(batches)


def pipeline_generator(
    pipeline: DiffusionPipeline, num_inference_steps: int, guidance_scale: float
) -> Generate:
    """A stock diffusers pipeline as a :data:`Generate`, with a generator on the CPU for each image."""
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        seed_steps(pipeline, generators)
        images = pipeline(
            prompts,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="pt",
            **stock_arguments(pipeline),
        ).images
        return to_bytes(images.float().clamp(0, 1))

    return generate


def evaluated_pipeline(config: EvaluateConfig) -> DiffusionPipeline:
    """The pipeline that the options name, in float32 on its device, with the right scheduler."""
    folder = config.pipeline or teacher_folder()
    steps, scale = config.num_inference_steps, config.guidance_scale
    return load_for_steps(folder, config.adapter, steps, device=config.device, guidance_scale=scale)


def evaluated_images(config: EvaluateConfig, captions: Sequence[Caption]) -> torch.Tensor:
    """Images (N, 3, 64, 64) uint8 of the captions: drawn ones for `real`, else those of the pipeline.

    Raises:
        WadiError: the pipeline cannot be loaded, or there is neither font nor atlas.
    """
    if config.real:
        generator = torch.Generator(config.device).manual_seed(config.seed)
        scenes = sample_scenes(stated(captions, config.device), generator)
        return draw(scenes, load_atlas(config.atlas).to(config.device), config.batch_size).cpu()
    steps, scale = config.num_inference_steps, config.guidance_scale
    generate = pipeline_generator(evaluated_pipeline(config), steps, scale)
    prompts = [caption.text for caption in captions]
    return generate_in_batches(generate, prompts, config.seed, config.batch_size)


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Generate images, judge them, and write the figures if `out` names a file; returns the figures.

    Raises:
        WadiError: too few images for a Frechet distance, or something cannot be read or may not be written.
    """
    fewest = fewest_images(NUM_FEATURES)
    if config.num_samples < fewest:
        raise WadiError(
            f"--num-samples {config.num_samples}: a Frechet distance of {NUM_FEATURES} features needs "
            f"at least {fewest} images"
        )
    inputs = (config.pipeline, config.adapter, config.atlas)
    output = Output(config.out or "", "emoji evaluate", inputs, config.overwrite, suffixes=(".json",))
    if config.out is not None:
        output.check()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    captions = evaluation_captions(config.prompts, config.num_samples)
    images = evaluated_images(config, captions)
    reading, columns = shipped_judge(config.device).read(images), stated(captions, config.device)
    figures = reading_figures(reading, columns, load_tensors(assets_folder() / "reference.safetensors"))
    if config.out is not None:
        options = {name: str(value) for name, value in vars(config).items()}
        by_name = alignment_by(reading, columns)
        with output.writing() as temporary:
            write_json(temporary, {"config": options, "figures": figures, "alignment_by": by_name})
    return figures
