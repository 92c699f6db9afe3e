"""ControlNets trained on a multi-step teacher, on its one-step student: agreement, and time.

    python experiments/control.py      # the built-in teacher, student and ControlNet: tables, JSON, picture
    python experiments/uses.py         # then: the tables of docs/uses/control.md

Scenes of combinations that no training has shown are drawn; their edges are the condition, and the prompt
names the objects and, half the time, the background, but neither place nor size. The edges of the results are
compared with the condition, and what the judge reads in them with the scenes. The emoji font is needed, or
--atlas.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm
from uses import control_table, pairs_table

from wadi.emoji import CONTROLNET_SCALE, assets_folder, controlnet_folder, student_folder, teacher_folder
from wadi.emoji.captions import Caption, stated
from wadi.emoji.glyphs import load_atlas
from wadi.emoji.judge import Judge, Reading, attributes_right
from wadi.emoji.scenes import IMAGE_SIZE, Scenes, render, sample_scenes
from wadi.emoji.train_controlnet import open_captions, scene_boxes
from wadi.errors import WadiError
from wadi.files import write_json
from wadi.onestep import check_image_path, labelled_grid, save_image
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks import load_controlnet, with_controlnets
from wadi.tasks.control import canny, edge_agreement, layout_map

STEPS, GUIDANCE = 25, 2.0
"""Of the teacher."""

SHOWN = 4
"""Rows of the picture."""

MARGIN = 2
"""Pixels around an object that belong to its map, where each of two objects has its own."""

Maps = list[Image.Image] | list[list[Image.Image]]
"""A condition map for each picture, or one for each ControlNet."""


@dataclass
class Options:
    """Steer teacher and student with one ControlNet, and let the judge read the pictures."""

    samples: int = 200
    """Scenes, of held-out combinations."""
    controlnet: Path | None = None
    """ControlNetModel folder; the shipped one if not given."""
    scales: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Conditioning scales of the student; 0 is the student alone."""
    pair_scale: float = 0.5
    """Conditioning scale of the student for scenes of two objects, steered by one ControlNet or two."""
    timed: int = 8
    """Pictures that are made one by one, for the time of each."""
    batch_size: int = 25
    """Pictures made at once otherwise."""
    seed: int = 0
    """Of the scenes; picture i starts from the noise of seed + i."""
    atlas: Path | None = None
    """Atlas file of `wadi emoji atlas`; drawn from the font if not given."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the pictures are made."""
    out: Path = Path("docs/results/control.json")
    """Figures."""
    picture: Path = Path("docs/images/control.jpg")
    """Scenes, edges and results."""


Generate = Callable[[list[str], Maps, list[int]], torch.Tensor]
"""Prompts, condition maps and seeds to pictures (N, 3, 64, 64) uint8 on the CPU."""


def draw(options: Options) -> tuple[list[Caption], Scenes, torch.Tensor]:
    """Captions, scenes, and their pictures (N, 3, 64, 64) uint8."""
    captions = open_captions(options.samples, "control", "held-out")
    scenes = sample_scenes(stated(captions), torch.Generator().manual_seed(options.seed))
    images = render(scenes, load_atlas(options.atlas))
    return captions, scenes, (images * 255).round().to(torch.uint8)


def edges_of(images: torch.Tensor) -> torch.Tensor:
    """(N, H, W) uint8 edges of pictures (N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([canny(image) for image in images.permute(0, 2, 3, 1).numpy()]))


def generator(
    pipeline: StableDiffusionControlNetPipeline | StableDiffusionPipeline,
    steps: int,
    scale: float | list[float],
) -> Generate:
    """A pipeline as a `Generate`; scale 0 is a pipeline without ControlNet, several are for several."""
    pipeline.set_progress_bar_config(disable=True)
    guidance = GUIDANCE if steps > 1 else 1.0

    def generate(prompts: list[str], maps: Maps, seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        control = {"image": maps, "controlnet_conditioning_scale": scale} if scale else {}
        images = pipeline(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
            **control,
        ).images
        return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()

    return generate


def read(judge: Judge, images: torch.Tensor, captions: list[Caption], scenes: Scenes) -> dict[str, float]:
    """What the judge reads, against caption and scene.

    Returns:
        ``objects`` and ``background``, shares of pictures with the stated ones; ``place_error`` in pixels,
        mean distance of the objects' centres from the scene's; ``size_error`` in pixels, mean difference of
        their sides.
    """
    reading = judge.read(images)
    right = attributes_right(reading, stated(captions))
    place, size = errors(reading, scenes)
    return {
        "objects": right["emoji"].double().mean().item(),
        "background": right["background"].double().mean().item(),
        "place_error": place.mean().item(),
        "size_error": size.mean().item(),
    }


def errors(reading: Reading, scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) mean error of place, and of size, of the objects of each scene, in pixels.

    Of two objects the judge's nearest assignment to the scene's counts.
    """
    pair = scenes.emoji[:, 1] >= 0

    def distances(flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
        center, size = (value.flip(1) if flip else value for value in (reading.center, reading.size))
        place, side = (center - scenes.center).norm(dim=2), (size - scenes.size).abs()
        return tuple(torch.where(pair, value.mean(1), value[:, 0]) for value in (place, side))

    straight, crossed = distances(False), distances(True)
    better = pair & (crossed[0] < straight[0])
    return tuple(IMAGE_SIZE * torch.where(better, b, a) for a, b in zip(straight, crossed, strict=True))


def load(options: Options, adapter: Path | None, steps: int, controlnets: int = 1) -> tuple:
    """Teacher or student, and the same with its ControlNet, or with that several times."""
    plain = load_for_steps(teacher_folder(), adapter, steps, device=options.device)
    controlnet = load_controlnet(options.controlnet or controlnet_folder(), plain)
    return plain, with_controlnets(plain, [controlnet] * controlnets)


def ways(options: Options) -> dict[str, tuple[int, float, Generate]]:
    """Name -> steps, conditioning scale, generator."""
    made = {}
    for name, adapter, steps, scales in (
        ("teacher", None, STEPS, (0.0, 1.0)),
        ("student", student_folder(), 1, options.scales),
    ):
        plain, steered = load(options, adapter, steps)
        for scale in scales:
            pipeline = steered if scale else plain
            made[f"{name}, scale {scale:g}"] = (steps, scale, generator(pipeline, steps, scale))
    return made


def in_batches(
    generate: Generate, prompts: list[str], maps: Maps, seeds: list[int], batch_size: int, label: str
) -> torch.Tensor:
    """(N, 3, 64, 64) uint8 of N prompts."""
    batches = []
    for first in tqdm(range(0, len(prompts), batch_size), desc=label, unit="batch"):
        part = slice(first, first + batch_size)
        batches.append(generate(prompts[part], maps[part], seeds[part]))
    return torch.cat(batches)


def map_for_each(scenes: Scenes, edges: torch.Tensor) -> list[list[Image.Image]]:
    """For each scene the edges of its first object, and those of its second, as two maps."""
    around = scene_boxes(scenes) + torch.tensor([-1, -1, 1, 1]) * MARGIN / IMAGE_SIZE
    own = [(edges * layout_map(around[:, slot, None], IMAGE_SIZE)).numpy() for slot in range(2)]
    return [[Image.fromarray(edge).convert("RGB") for edge in pair] for pair in zip(*own, strict=True)]


def two_controlnets(
    options: Options, judge: Judge, captions: list[Caption], scenes: Scenes, edges: torch.Tensor
) -> list[dict]:
    """Scenes of two objects by the student: one ControlNet for both, or one with a map for each."""
    chosen = [i for i, caption in enumerate(captions) if len(caption.emoji) == 2]
    if not chosen:
        return []
    captions, scenes, edges = [captions[i] for i in chosen], scenes[torch.tensor(chosen)], edges[chosen]
    prompts, seeds, rows = [caption.text for caption in captions], [options.seed + i for i in chosen], []
    whole = [Image.fromarray(edge).convert("RGB") for edge in edges.numpy()]
    for name, count, maps in (("one", 1, whole), ("two", 2, map_for_each(scenes, edges))):
        _, steered = load(options, student_folder(), 1, count)
        generate = generator(steered, 1, options.pair_scale if count == 1 else [options.pair_scale] * count)
        images = in_batches(generate, prompts, maps, seeds, options.batch_size, f"{name} for two objects")
        agreement = edge_agreement(edges, edges_of(images)).mean().item()
        figures = {"edge_f1": agreement} | read(judge, images, captions, scenes)
        row = {"controlnets": count, "scale": options.pair_scale, "scenes": len(chosen)}
        rows.append(row | figures)
    return rows


def seconds_each(
    made: dict[str, tuple[int, float, Generate]], prompts: list[str], maps: list[Image.Image], timed: int
) -> dict[str, float]:
    """Median seconds of a picture alone, all ways in turn; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in tqdm(range(timed + 1), desc="time", unit="turn"):
        i = turn % len(prompts)
        for name, (_, _, generate) in made.items():
            start = time.perf_counter()
            generate([prompts[i]], [maps[i]], [i])  # ends on the CPU: nothing is left to wait for
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(options: Options) -> None:
    """Measure, print the table, write JSON and picture."""
    if options.samples < 1 or options.timed < 1 or options.batch_size < 1:
        raise WadiError("--samples, --timed, --batch-size: must be at least 1")
    check_image_path(options.picture, "--picture", overwrite=True)
    captions, scenes, real = draw(options)
    edges = edges_of(real)
    maps = [Image.fromarray(edge).convert("RGB") for edge in edges.numpy()]
    prompts, seeds = [caption.text for caption in captions], [options.seed + i for i in range(len(captions))]
    judge, made = Judge.load(assets_folder() / "judge.safetensors"), ways(options)
    seconds = seconds_each(made, prompts, maps, options.timed)
    size = options.batch_size
    pictures = {name: in_batches(way[2], prompts, maps, seeds, size, name) for name, way in made.items()}
    pictures["autoencoder"] = reconstructed(real)
    rows = []
    for name, images in pictures.items():
        agreement = edge_agreement(edges, edges_of(images)).mean().item()
        figures = {"edge_f1": agreement} | read(judge, images, captions, scenes)
        steps, scale, _ = made.get(name, (None, None, None))
        row = {"name": name, "steps": steps, "scale": scale} | figures
        rows.append(row | {"seconds": seconds.get(name)})
    pairs = two_controlnets(options, judge, captions, scenes, edges)
    print(control_table({"rows": rows}), pairs_table({"pairs": pairs}), sep="\n\n")
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    header = f"{len(prompts)} held-out scenes, {device}, torch {torch.__version__}, {date.today()}"
    found = {"header": header, "rows": list(map(rounded, rows)), "pairs": list(map(rounded, pairs))}
    write_json(options.out, found | {"summary": summary(rows)})
    save_pictures(options.picture, prompts, real, maps, pictures)


def rounded(row: dict) -> dict:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


@torch.no_grad()
def reconstructed(images: torch.Tensor) -> torch.Tensor:
    """Pictures (N, 3, 64, 64) uint8 through the autoencoder: no result can keep more of them."""
    vae = load_for_steps(teacher_folder(), None, STEPS).vae
    batches = []
    for batch in images.split(50):
        latents = vae.encode(batch.float() / 127.5 - 1).latent_dist.mode()
        batches.append(((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(batches)


def summary(rows: list[dict]) -> list[dict]:
    """Rows of the table of docs/uses.md: teacher at scale 1, student at the scale that the command takes."""
    found = {row["name"]: row for row in rows}
    teacher = found["teacher, scale 1"]
    name = f"student, scale {CONTROLNET_SCALE:g}"
    student = found.get(name) or [row for row in rows if row["name"].startswith("student")][-1]
    ratio = round(teacher["seconds"] / student["seconds"], 1)
    return [
        {
            "use": "a condition, by ControlNet",
            "measure": measure,
            "teacher": round(teacher[key], 4),
            "student": round(student[key], 4),
            "time_ratio": ratio,
        }
        for key, measure in (
            ("edge_f1", "edges of the image are those of the condition, F1 (up)"),
            ("objects", "objects of the prompt are there (up)"),
        )
    ]


def save_pictures(
    path: Path,
    prompts: list[str],
    real: torch.Tensor,
    maps: list[Image.Image],
    pictures: dict[str, torch.Tensor],
) -> None:
    """A row for each of the first scenes: scene, edges, and what each way made of them."""
    names = [name for name in pictures if name != "autoencoder"]
    rows = []
    for i, prompt in enumerate(prompts[:SHOWN]):
        made = [Image.fromarray(pictures[name][i].permute(1, 2, 0).numpy()) for name in names]
        scene = Image.fromarray(real[i].permute(1, 2, 0).numpy())
        rows.append((prompt, [scene, maps[i], *made]))
    save_image(labelled_grid(rows, ["scene", "edges", *names]), path, overwrite=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
