"""`wadi emoji evaluate`: what the judge says of a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from wadi.emoji import assets_folder, teacher_folder
from wadi.emoji.captions import COLOURS, RELATIONS, SIZES, Caption, sample_captions, stated
from wadi.emoji.glyphs import NAMES, load_atlas
from wadi.emoji.judge import NUM_FEATURES, Judge, Reading, attributes_right
from wadi.emoji.scenes import FREE, render, sample_scenes
from wadi.errors import WadiError
from wadi.files import load_tensors, write_json
from wadi.metrics import (
    entropy_bits,
    feature_statistics,
    fewest_images,
    frechet_distance,
    precision_recall,
)
from wadi.outputs import Output
from wadi.progress import progress

Generate = Callable[[list[str], list[int]], torch.Tensor]
"""Prompts and seeds to images (N, 3, 64, 64) uint8."""


@dataclass
class EvaluateConfig:
    """Score a pipeline on captions of the emoji world with the judge."""

    pipeline: Path | None = None
    """Pipeline folder; the shipped teacher if not given."""
    adapter: Path | None = None
    """LoRaD adapter folder, merged before sampling."""
    num_inference_steps: int = 1
    """Denoising steps; 1 uses the one-step scheduler."""
    guidance_scale: float = 1.0
    """Guidance of a multi-step pipeline."""
    num_samples: int = 10_000
    """Images."""
    prompts: Literal["selection", "test", "held-out"] = "test"
    """Which captions: settings are chosen on `selection` and reported on `test`; `held-out` states
    combinations that training never showed."""
    seed: int = 0
    """Seed of the first image; the next ones follow."""
    batch_size: int = 250
    """Images at a time; does not change the result."""
    real: bool = False
    """Score freshly drawn images instead of a pipeline's: what the judge itself misreads."""
    atlas: Path | None = None
    """Atlas file of `wadi emoji atlas` for `real`; drawn from the font if not given."""
    out: Path | None = None
    """JSON file for the figures."""
    overwrite: bool = False
    """Replace that file if there is one already."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""


def judge_images(
    images: torch.Tensor, captions: Sequence[Caption], assets: Path | None = None, device: str = "cpu"
) -> dict[str, float]:
    """Score images against their captions and against real images.

    Args:
        images: (N, 3, 64, 64) uint8.
        captions: N.
        assets: folder with judge.safetensors and reference.safetensors; the shipped ones if None.
        device: where the judge runs.

    Returns:
        ``frechet_distance``, ``precision``, ``recall``, ``alignment`` and its parts, and what varies of what
        the captions leave free: see :func:`free_attributes`.
    """
    assets = assets or assets_folder()
    reference = load_tensors(assets / "reference.safetensors")
    return reading_figures(*read_images(images, captions, assets, device), reference)


def read_images(
    images: torch.Tensor, captions: Sequence[Caption], assets: Path, device: str
) -> tuple[Reading, dict[str, torch.Tensor]]:
    """What the judge reads in (N, 3, 64, 64) uint8 images, and what their captions state, on the device."""
    reading = Judge.load(assets / "judge.safetensors").to(device).read(images)
    return reading, {name: column.to(device) for name, column in stated(captions).items()}


def reading_figures(
    reading: Reading, columns: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> dict[str, float]:
    """The figures of :func:`judge_images` from what the judge has read.

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
    """Which captions come out wrong: the share of those that are right in all, by what they name.

    Returns:
        ``emoji``, ``size`` and ``relation``, each with a share for every name that a caption has; a caption
        of two emoji counts for both.
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
    """How much varies of what the captions leave free: what a collapsed student loses first.

    Returns:
        Entropies in bits, each over the images whose caption leaves that attribute free:

        - ``background_entropy``, ten colours, equally likely in the data: 3.32;
        - ``place_entropy`` of single objects, nine cells of the room that each has: 3.17 if uniform;
        - ``size_entropy`` of single objects, four ranges between the smallest and the biggest: 2 if uniform;
        - ``order_entropy`` of "A and B", whether A is left of, right of, above or below B: 2 if uniform;
          of the images that show A and B;

        and ``place_spread`` and ``size_spread``, standard deviations in pixels of the same places and sizes.
        A figure is nan where no image counts.
    """
    single = columns["emoji"][:, 1] < 0
    anywhere = single & (columns["place"] < 0)
    any_size = single & (columns["size"] < 0)
    colours = reading.background[columns["background"] < 0]
    center, size = reading.center[anywhere, 0], reading.size[any_size, 0]
    side = 64
    return {
        "background_entropy": _entropy(colours, len(COLOURS)),
        "place_entropy": _entropy(_cells(center, reading.size[anywhere, 0]), 9),
        "size_entropy": _entropy(_bins((size - FREE[0]) / (FREE[1] - FREE[0]), 4), 4),
        "order_entropy": _entropy(_orders(reading, columns), 4),
        "place_spread": side * center.std(0).mean().item(),
        "size_spread": side * size.std().item(),
    }


def _entropy(classes: torch.Tensor, num_classes: int) -> float:
    return entropy_bits(classes, num_classes) if len(classes) else float("nan")


def _bins(value: torch.Tensor, count: int) -> torch.Tensor:
    """(N,) in [0, 1] to one of `count` equal ranges; what is outside belongs to the nearest."""
    return (value * count).floor().long().clamp(0, count - 1)


def _cells(center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Which of 3 x 3 cells of the room that an object of its size has: the renderer draws places in it."""
    room = (0.5 - size / 2).clamp(min=1e-3)
    column, row = _bins(((center - 0.5) / room[:, None] + 1) / 2, 3).unbind(1)
    return 3 * row + column


def _orders(reading: Reading, columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where the first object of "A and B" is, seen from the second: left, right, above or below."""
    first, second = columns["emoji"].unbind(1)
    crossed = (reading.emoji[:, 0] == second) & (reading.emoji[:, 1] == first)
    straight = (reading.emoji[:, 0] == first) & (reading.emoji[:, 1] == second)
    counts = (columns["relation"] == RELATIONS.index("and")) & (straight | crossed)
    center = torch.where(crossed[:, None, None], reading.center.flip(1), reading.center)[counts]
    dx, dy = (center[:, 0] - center[:, 1]).unbind(1)
    horizontal = dx.abs() > dy.abs()
    return torch.where(horizontal, (dx > 0).long(), 2 + (dy > 0).long())


def evaluation_captions(prompts: str, count: int) -> list[Caption]:
    """The captions of an evaluation: the same in every run and on every machine."""
    if prompts == "held-out":
        return sample_captions(count, "test", split="held-out")
    return sample_captions(count, prompts)


@torch.no_grad()
def generate_in_batches(generate: Generate, prompts: list[str], seed: int, batch_size: int) -> torch.Tensor:
    """(N, 3, 64, 64) uint8; image i has seed `seed` + i, whatever the batch size."""
    batches = []
    for first in progress(range(0, len(prompts), batch_size), desc="images", unit="batch"):
        part = prompts[first : first + batch_size]
        batches.append(generate(part, [seed + first + i for i in range(len(part))]).cpu())
    return torch.cat(batches)


def pipeline_generator(pipeline, num_inference_steps: int, guidance_scale: float) -> Generate:
    """A stock diffusers pipeline as a :data:`Generate`; noise from the CPU, a generator for each image."""
    from wadi.onestep.loading import stock_arguments

    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        images = pipeline(
            prompts,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            **stock_arguments(pipeline),
        ).images
        return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)

    return generate


def evaluated_pipeline(config: EvaluateConfig):
    """The pipeline that a configuration names, in float32 on its device, with the right scheduler."""
    from wadi.onestep.pipeline import load_for_steps

    folder = config.pipeline or teacher_folder()
    return load_for_steps(folder, config.adapter, config.num_inference_steps, device=config.device)


def generated_pictures(config: EvaluateConfig, captions: Sequence[Caption]) -> torch.Tensor:
    """(N, 3, 64, 64) uint8 of the pipeline that a configuration names."""
    generate = pipeline_generator(
        evaluated_pipeline(config), config.num_inference_steps, config.guidance_scale
    )
    return generate_in_batches(
        generate, [caption.text for caption in captions], config.seed, config.batch_size
    )


def drawn_pictures(config: EvaluateConfig, captions: Sequence[Caption]) -> torch.Tensor:
    """(N, 3, 64, 64) uint8 from the renderer.

    Raises:
        WadiError: there is neither font nor atlas.
    """
    atlas = load_atlas(config.atlas).to(config.device).float() / 255
    columns = {name: column.to(config.device) for name, column in stated(captions).items()}
    scenes = sample_scenes(columns, torch.Generator(config.device).manual_seed(config.seed))
    starts = progress(range(0, len(captions), config.batch_size), desc="images", unit="batch")
    batches = [render(scenes[first : first + config.batch_size], atlas) for first in starts]
    return torch.cat([(batch * 255).round().to(torch.uint8).cpu() for batch in batches])


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Generate, judge, and write the figures."""
    fewest = fewest_images(NUM_FEATURES)
    if config.num_samples < fewest:
        raise WadiError(
            f"--num-samples {config.num_samples}: a Frechet distance of {NUM_FEATURES} features needs "
            f"at least {fewest}"
        )
    if config.adapter is not None and config.num_inference_steps != 1:
        raise WadiError(
            f"--num-inference-steps {config.num_inference_steps}: the student of --adapter takes one step"
        )
    inputs = (config.pipeline, config.adapter, config.atlas)
    output = Output(config.out or "", "emoji evaluate", inputs, config.overwrite, suffixes=(".json",))
    if config.out is not None:
        output.check()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    captions = evaluation_captions(config.prompts, config.num_samples)
    images = drawn_pictures(config, captions) if config.real else generated_pictures(config, captions)
    reading, columns = read_images(images, captions, assets_folder(), config.device)
    figures = reading_figures(reading, columns, load_tensors(assets_folder() / "reference.safetensors"))
    if config.out is not None:
        options = {name: str(value) for name, value in vars(config).items()}
        by_name = alignment_by(reading, columns)
        with output.writing() as temporary:
            write_json(temporary, {"config": options, "figures": figures, "alignment_by": by_name})
    return figures
