"""Pictures of pictures, and guidance forced on a student: teacher in 25 guided steps against one step.

    python experiments/editing.py      # the built-in pair; a GPU takes a minute or two, two cores an hour
    python experiments/uses.py         # then: the tables of docs/uses/editing.md

Image to image: a scene of one object that the caption states wholly; the prompt names another object only.
How often is that one there, and the ground, the place and the size still the scene's?
Inpainting: `replace` masks the object's box and names another; `add` masks the half of the picture where
nothing is, and names a second object. Guidance: the test captions, with guidance forced through the stock
pipeline. Negative prompts: they name the ground that the picture of that seed has without one. The emoji font
is needed, or --atlas.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
import tyro
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from wadi.emoji import assets_folder, student_folder, teacher_folder
from wadi.emoji.captions import COLOURS, PLACES, RELATIONS, SIZES, Caption, sample_captions, stated
from wadi.emoji.evaluate import reading_figures
from wadi.emoji.glyphs import NAMES, load_atlas
from wadi.emoji.judge import Judge, Reading, attributes_right
from wadi.emoji.scenes import IMAGE_SIZE, Scenes, render, sample_scenes
from wadi.errors import WadiError
from wadi.files import load_tensors, write_json
from wadi.onestep import labelled_grid, save_image
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks.editing import CANDIDATES, Sampling, image_to_image, inpaint, seam

STEPS, GUIDANCE = 25, 2.0
"""Of the teacher."""

SHOWN = 6
"""Rows of each picture."""


@dataclass
class Options:
    """Edit scenes, and force guidance, with teacher and student; let the judge read the pictures."""

    samples: int = 200
    """Scenes of each study."""
    guided_samples: int = 2000
    """Captions of the study of guidance; a Fréchet distance needs at least 256."""
    strengths: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    """Of image to image; inpainting takes those from 0.6 on."""
    guidance: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    """Scales that are forced on the student."""
    timed: int = 8
    """Pictures that are made one by one, for the time of each."""
    batch_size: int = 100
    """Pictures made at once."""
    atlas: Path | None = None
    """Atlas file of `wadi emoji atlas`; drawn from the font if not given."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the pictures are made."""
    out: Path = Path("docs/results/editing.json")
    """Figures."""
    pictures: Path = Path("docs/images")
    """Folder of image-to-image.jpg and inpainting.jpg."""


@dataclass(frozen=True)
class Edit:
    """Scenes that are edited.

    Attributes:
        images: (N, 3, 64, 64) in [0, 1].
        masks: (N, 1, 64, 64), 1 where they are repainted.
        texts: N prompts.
        before: what the scenes show.
        after: what the results shall show.
    """

    images: torch.Tensor
    masks: torch.Tensor
    texts: list[str]
    before: list[Caption]
    after: list[Caption]


# --- scenes ---


def _another(rng: random.Random, emoji: int) -> int:
    return (emoji + rng.randrange(1, len(NAMES))) % len(NAMES)


def replaced(count: int, atlas: torch.Tensor) -> Edit:
    """Scenes of one object, of which everything is stated; the prompt names another object."""
    rng = random.Random("wadi-editing-replace")
    before = [
        Caption(
            emoji=(rng.randrange(len(NAMES)),),
            size=rng.randrange(len(SIZES)),
            place=rng.randrange(len(PLACES)),
            background=rng.randrange(len(COLOURS)),
        )
        for _ in range(count)
    ]
    scenes = sample_scenes(stated(before), torch.Generator().manual_seed(0))
    new = [(_another(rng, caption.emoji[0]),) for caption in before]
    texts = [Caption(emoji=emoji).text for emoji in new]
    after = [dataclasses.replace(old, emoji=emoji) for old, emoji in zip(before, new, strict=True)]
    return Edit(render(scenes, atlas), boxes(scenes), texts, before, after)


def boxes(scenes: Scenes, grow: float = 1.25) -> torch.Tensor:
    """(N, 1, 64, 64) masks around the first objects of scenes, `grow` times as large as they."""
    axis = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    near = (axis - scenes.center[:, 0, :, None]).abs() < grow / 2 * scenes.size[:, 0, None, None]
    return (near[:, 1, :, None] & near[:, 0, None, :])[:, None].float()


def added(count: int, atlas: torch.Tensor) -> Edit:
    """Scenes of one object on the left; the prompt names it and another, left of which it is."""
    rng = random.Random("wadi-editing-add")
    after = [
        Caption(
            emoji=tuple(rng.sample(range(len(NAMES)), 2)),
            relation=RELATIONS.index("left of"),
            background=rng.randrange(len(COLOURS)),
        )
        for _ in range(count)
    ]
    scenes = sample_scenes(stated(after), torch.Generator().manual_seed(1))
    scenes.emoji[:, 1] = -1
    masks = torch.zeros(count, 1, IMAGE_SIZE, IMAGE_SIZE)
    masks[..., IMAGE_SIZE // 2 + 2 :] = 1
    texts = [dataclasses.replace(caption, background=None).text for caption in after]
    before = [Caption(emoji=caption.emoji[:1], background=caption.background) for caption in after]
    return Edit(render(scenes, atlas), masks, texts, before, after)


# --- pictures ---


Way = Callable[[Edit, Sequence[int]], torch.Tensor]
"""An edit and its seeds to pictures (N, 3, 64, 64) in [0, 1] on the CPU."""


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def varied(pipeline: DiffusionPipeline, sampling: Sampling) -> Way:
    return lambda edit, seeds: image_to_image(pipeline, edit.texts, edit.images, sampling, _generators(seeds))


def repainted(pipeline: DiffusionPipeline, sampling: Sampling) -> Way:
    return lambda edit, seeds: inpaint(
        pipeline, edit.texts, edit.images, edit.masks, sampling, _generators(seeds)
    )


def from_noise(pipeline: DiffusionPipeline) -> Way:
    """What stock diffusers makes in one step: of noise alone, with the known latents put back at the end."""
    from diffusers import StableDiffusionInpaintPipeline

    stock = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)

    def make(edit: Edit, seeds: Sequence[int]) -> torch.Tensor:
        made = stock(
            edit.texts,
            image=edit.images,
            mask_image=edit.masks,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            strength=1.0,
            num_inference_steps=1,
            guidance_scale=1.0,
            generator=_generators(seeds),
            output_type="pt",
        ).images
        return torch.where(edit.masks > 0.5, made.float().cpu(), edit.images)

    return make


def in_batches(way: Way, edit: Edit, batch_size: int, label: str, seed: int = 0) -> torch.Tensor:
    batches = []
    for first in tqdm(range(0, len(edit.texts), batch_size), desc=label, unit="batch"):
        part = slice(first, first + batch_size)
        chosen = Edit(**{field.name: getattr(edit, field.name)[part] for field in dataclasses.fields(Edit)})
        batches.append(way(chosen, range(seed + first, seed + first + len(chosen.texts))))
    return torch.cat(batches)


def best(ways: Sequence[torch.Tensor], masks: torch.Tensor) -> torch.Tensor:
    """Of several repaintings of each scene the one with the least seam."""
    stack = torch.stack(list(ways))
    chosen = torch.stack([seam(images, masks) for images in ways]).argmin(0)
    return stack[chosen, torch.arange(stack.shape[1])]


# --- figures ---


def edit_figures(reading: Reading, edit: Edit) -> dict[str, float]:
    """Shares of pictures: the new object is there, what is kept of the scene, and all of it together."""
    right = attributes_right(reading, stated(edit.after))
    names = {"emoji": "object", "background": "background", "place": "place", "size": "size", "all": "all"}
    return {new: right[old].double().mean().item() for old, new in names.items()}


def image_to_image_study(models: dict, edit: Edit, judge: Judge, options: Options) -> tuple[list, dict]:
    """A row for each model and strength; and pictures by the names of the rows."""
    rows, pictures = [], {}
    for name, (pipeline, steps) in models.items():
        for strength in options.strengths:
            sampling = Sampling(strength, steps, GUIDANCE if steps > 1 else 1.0)
            label = f"{name}, {strength:g}"
            images = in_batches(varied(pipeline, sampling), edit, options.batch_size, label)
            row = {"model": name, "steps": steps, "strength": strength}
            rows.append(row | edit_figures(judge.read(images), edit))
            pictures[label] = images
    return rows, pictures


def inpainting_study(models: dict, edit: Edit, judge: Judge, options: Options) -> tuple[list, dict]:
    """A row for each way of repainting: model, strength, candidates; and pictures by names."""
    rows, pictures = [], {}

    def keep(model: str, steps: int, strength: float | None, count: int, images: torch.Tensor) -> None:
        row = {"model": model, "steps": steps, "strength": strength, "candidates": count}
        figures = edit_figures(judge.read(images), edit)
        rows.append(row | figures | {"seam": 255 * seam(images, edit.masks).mean().item()})
        label = f"{model}, {'noise' if strength is None else f'{strength:g}'}"
        pictures[label + (f", of {count}" if count > 1 else "")] = images

    student, teacher = models["student"][0], models["teacher"][0]
    keep("student", 1, None, 1, in_batches(from_noise(student), edit, options.batch_size, "noise"))
    for strength in [strength for strength in options.strengths if strength >= 0.6]:
        way = repainted(student, Sampling(strength))
        made = [
            in_batches(way, edit, options.batch_size, f"{strength:g}", seed=10_000 * i)
            for i in range(CANDIDATES)
        ]
        keep("student", 1, strength, 1, made[0])
        keep("student", 1, strength, CANDIDATES, best(made, edit.masks))
        way = repainted(teacher, Sampling(strength, STEPS, GUIDANCE))
        keep(
            "teacher", STEPS, strength, 1, in_batches(way, edit, options.batch_size, f"teacher {strength:g}")
        )
    return rows, pictures


def guided(pipeline: DiffusionPipeline, options: Options, steps: int, label: str, **calls) -> torch.Tensor:
    """Pictures of the stock pipeline, called as it is; lists and tensors are cut into batches."""
    count = len(calls.get("prompt", calls.get("prompt_embeds")))
    batches = []
    for first in tqdm(range(0, count, options.batch_size), desc=label, unit="batch"):
        part = slice(first, first + options.batch_size)
        cut = {name: value if isinstance(value, float) else value[part] for name, value in calls.items()}
        seeds = range(first, min(count, first + options.batch_size))
        made = pipeline(**cut, num_inference_steps=steps, generator=_generators(seeds), output_type="pt")
        batches.append(made.images.float().cpu())
    return torch.cat(batches)


def guidance_study(student: DiffusionPipeline, judge: Judge, options: Options) -> list[dict]:
    """A row for each scale that is forced on the student: alignment, Fréchet distance, free background."""
    captions = sample_captions(options.guided_samples, "test")
    texts, columns = [caption.text for caption in captions], stated(captions)
    reference = load_tensors(assets_folder() / "reference.safetensors")
    rows = []
    for scale in options.guidance:
        images = guided(student, options, 1, f"guidance {scale:g}", prompt=texts, guidance_scale=float(scale))
        figures = reading_figures(judge.read(images), columns, reference)
        names = ("alignment", "frechet_distance", "precision", "recall", "background_entropy")
        rows.append({"guidance_scale": scale} | {name: figures[name] for name in names})
    return rows


@torch.no_grad()
def negative_study(models: dict, judge: Judge, options: Options) -> list[dict]:
    """A row for each way to say what shall not be there: share that still has it, and that has its object.

    Without a negative prompt each picture has some ground; then it is named as what shall not be there, and
    the same seed drawn again. `embedding`: the prompt's embedding is moved away from the negative prompt's,
    c + w (c - c_negative), which costs no second prediction.
    """
    rng = random.Random("wadi-editing-negative")
    captions = [Caption(emoji=(rng.randrange(len(NAMES)),)) for _ in range(options.samples)]
    texts, columns, rows = [caption.text for caption in captions], stated(captions), []
    for name, scales in (("student", (1.5, 2.0, 3.0)), ("teacher", (GUIDANCE,))):
        pipeline, steps = models[name]
        plain = {"prompt": texts, "guidance_scale": GUIDANCE if steps > 1 else 1.0}
        first = judge.read(guided(pipeline, options, steps, name, **plain))
        grounds = [int(ground) for ground in first.background]
        away = [dataclasses.replace(c, background=b).text for c, b in zip(captions, grounds, strict=True)]
        tried = {("none", None): plain}
        for scale in scales:
            tried["negative prompt", scale] = plain | {"negative_prompt": away, "guidance_scale": scale}
        if steps == 1:
            own, other = (pipeline.encode_prompt(t, pipeline.device, 1, False)[0] for t in (texts, away))
            for weight in (0.5, 1.0, 2.0):
                embeds = own + weight * (own - other)
                tried["embedding", weight] = {"prompt_embeds": embeds, "guidance_scale": 1.0}
        for (way, scale), call in tried.items():
            reading = judge.read(guided(pipeline, options, steps, f"{name}, {way} {scale}", **call))
            still = (reading.background == first.background).double().mean().item()
            right = attributes_right(reading, columns)["all"].double().mean().item()
            row = {"model": name, "steps": steps, "way": way, "scale": scale}
            rows.append(row | {"still": still, "object": right})
    return rows


def seconds_each(ways: dict[str, Callable[[int], object]], timed: int) -> dict[str, float]:
    """Median seconds of a call, all ways in turn; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(timed + 1):
        for name, make in ways.items():
            start = time.perf_counter()
            make(turn)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _alone(way: Way, edit: Edit, turn: int) -> None:
    way(edit, [turn])


def times(models: dict, edit: Edit, timed: int) -> dict[str, float]:
    """Seconds of one picture at strength 0.8: each model, image to image and inpainting; and candidates."""
    one = Edit(edit.images[:1], edit.masks[:1], edit.texts[:1], edit.before[:1], edit.after[:1])
    several = Edit(
        one.images.expand(CANDIDATES, -1, -1, -1),
        one.masks.expand(CANDIDATES, -1, -1, -1),
        one.texts * CANDIDATES,
        one.before * CANDIDATES,
        one.after * CANDIDATES,
    )
    ways = {}
    for name in ("teacher", "student"):
        pipeline, steps = models[name]
        sampling = Sampling(0.8, steps, GUIDANCE if steps > 1 else 1.0)
        for use, make in (("image to image", varied), ("inpainting", repainted)):
            ways[f"{name}, {use}"] = partial(_alone, make(pipeline, sampling), one)
    best_of = repainted(models["student"][0], Sampling(0.8))
    ways["student, inpainting with candidates"] = lambda turn: best_of(several, range(CANDIDATES))
    return seconds_each(ways, timed)


# --- all together ---


def main(options: Options) -> None:
    """Measure, print what was found, write JSON and pictures."""
    if min(options.samples, options.timed, options.batch_size) < 1 or options.guided_samples < 256:
        raise WadiError(
            "--samples, --timed, --batch-size must be at least 1, and --guided-samples at least 256"
        )
    judge, atlas = Judge.load(assets_folder() / "judge.safetensors"), load_atlas(options.atlas)
    teacher = load_for_steps(teacher_folder(), None, STEPS, device=options.device)
    models = {
        "teacher": (teacher, STEPS),
        "teacher in one step": (load_for_steps(teacher_folder(), None, 1, device=options.device), 1),
        "student": (load_for_steps(teacher_folder(), student_folder(), 1, device=options.device), 1),
    }
    for pipeline, _ in models.values():
        pipeline.set_progress_bar_config(disable=True)
    atlas = atlas.float() / 255
    edits = {"replace": replaced(options.samples, atlas), "add": added(options.samples, atlas)}
    seconds = times(models, edits["replace"], options.timed)
    found = {"samples": options.samples, "guided_samples": options.guided_samples, "seconds": seconds}
    found["image_to_image"], varied_pictures = image_to_image_study(models, edits["replace"], judge, options)
    repainted_pictures = {}
    for name, edit in edits.items():
        found[name], repainted_pictures[name] = inpainting_study(models, edit, judge, options)
    found["guidance"] = guidance_study(models["student"][0], judge, options)
    found["negative"] = negative_study(models, judge, options)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    header = f"{options.samples} scenes, {options.guided_samples} captions for guidance, {device}"
    header += f", torch {torch.__version__}, {date.today()}"
    write_json(options.out, rounded({"header": header, **found, "summary": summary(found)}))
    for name in ("image_to_image", "replace", "add", "guidance", "negative"):
        print(f"\n{name}\n" + "\n".join(str(rounded(row)) for row in found[name]))
    save_pictures(options.pictures, edits, varied_pictures, repainted_pictures)


def rounded(value):
    """Figures with four decimals."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def summary(found: dict) -> list[dict]:
    """Rows of the table of docs/uses.md, each model at its own best strength."""
    seconds = found["seconds"]

    def row(use: str, study: str, measure: str, student_time: str, **chosen) -> dict:
        own = {
            name: max(
                each["all"]
                for each in found[study]
                if each["model"] == name
                and all(each[key] == value for key, value in chosen.items() if name == "student")
            )
            for name in ("teacher", "student")
        }
        kind = student_time.split(" with")[0]
        ratio = seconds[f"teacher, {kind}"] / seconds[f"student, {student_time}"]
        return {"use": use, "measure": measure, **own, "time_ratio": ratio}

    kept = "new object, ground, place and size right, best strength (up)"
    repainted_all = "new object and all that was there right, best strength (up)"
    best_of = {"candidates": CANDIDATES}
    inpainting = f"inpainting, best of {CANDIDATES} in one step"
    return [
        row("image to image", "image_to_image", kept, "image to image"),
        row(f"{inpainting}: replace", "replace", repainted_all, "inpainting with candidates", **best_of),
        row(f"{inpainting}: add", "add", repainted_all, "inpainting with candidates", **best_of),
    ]


def save_pictures(
    folder: Path, edits: dict[str, Edit], varied_pictures: dict, repainted_pictures: dict
) -> None:
    """image-to-image.jpg: a row for each of the first scenes, strengths side by side; inpainting.jpg."""

    def shown(images: torch.Tensor, i: int) -> Image.Image:
        return Image.fromarray((images[i] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    edit = edits["replace"]
    names = [name for name in varied_pictures if not name.startswith("teacher in")]
    rows = [
        (edit.texts[i], [shown(edit.images, i), *(shown(varied_pictures[name], i) for name in names)])
        for i in range(min(SHOWN, len(edit.texts)))
    ]
    save_image(labelled_grid(rows, ["picture", *names]), folder / "image-to-image.jpg", overwrite=True)
    rows = []
    for kind, edit in edits.items():
        made = repainted_pictures[kind]
        for i in range(min(SHOWN // 2, len(edit.texts))):
            masked = torch.where(edit.masks > 0.5, 0.5, edit.images)
            cells = [shown(images, i) for images in (edit.images, masked, *made.values())]
            rows.append((edit.texts[i], cells))
    names = list(repainted_pictures["add"])
    save_image(labelled_grid(rows, ["picture", "mask", *names]), folder / "inpainting.jpg", overwrite=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
