"""Larger pictures than a student was trained for, with and without re-dilated convolutions.

    python experiments/high_resolution.py        # the emoji student and its teacher, for a GPU: JSON, image
    python experiments/high_resolution.py --teacher-samples 0    # the student; two cores, 5 minutes
    python experiments/uses.py                   # then: the table of docs/uses/high-resolution.md

The models were trained at 64 px, and the judge knows 64 px. Every image shows one object and is read twice.
Reduced to 64 px: is all right that the caption states, and how many objects are there? The mean of many
pixels hides what the eye sees first, so the image is also read at its own resolution: is the object
recognised in a close-up, and is the background as free of grain as the teacher's? An image is right if
everything is.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import DiffusionPipeline
from tqdm import tqdm

from wadi.emoji import assets_folder, student_folder, teacher_folder
from wadi.emoji.captions import Caption, sample_captions, stated
from wadi.emoji.judge import Judge, attributes_right
from wadi.errors import WadiError
from wadi.files import load_tensors, save_tensors, write_json
from wadi.onestep import check_image_path, labelled_grid, save_image
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks import growth, redilated

OWN = 64
STEPS, GUIDANCE = 25, 2.0
"""Of the teacher."""
CLOSE_UP = 0.75
"""Share of a close-up that its object takes at most: the judge was trained with objects of up to 0.72."""
SQUARE = 8
"""Side in pixels of the squares in which grain is measured."""
GRAIN_LIMIT = 0.53
"""In 8-bit steps: twice the mean of the teacher in 25 steps at 64 px, which is 0.265."""
SHOWN = (
    "a panda",
    "a big rocket on a blue background",
    "a small red apple on the left",
    "a cat at the top on a green background",
)
"""Prompts of the picture."""


@dataclass
class Options:
    """Make pictures of several sizes, with and without re-dilation, and let the judge read them."""

    samples: int = 200
    """Captions of one object, of the test set."""
    teacher_samples: int = 200
    """The first of them, for the teacher; 0 omits it."""
    sizes: tuple[int, ...] = (96, 128, 192)
    """Sides in pixels."""
    damping: tuple[float, ...] = ()
    """Also with these shares of the plain prediction."""
    batch_size: int = 25
    """Pictures at a time."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""
    images: Path | None = None
    """Folder that keeps the images of each row. Images that are there are read and not made again: name a new
    folder for another student, or other captions."""
    out: Path = Path("docs/results/high-resolution.json")
    """JSON file for the figures."""
    picture: Path = Path("docs/images/high-resolution.jpg")
    """Pictures by the side, plain and re-dilated."""


def pictures(
    pipeline: DiffusionPipeline,
    texts: list[str],
    size: int,
    damping: float | None,
    batch_size: int,
    steps: int = 1,
) -> tuple[torch.Tensor, float]:
    """(N, 3, size, size) in [0, 1] on the CPU, picture i from seed i; and seconds a picture.

    Re-dilated and damped by so much, or not re-dilated where that is None.
    """
    guidance = GUIDANCE if steps > 1 else 1.0
    factors = (1.0, 1.0) if damping is None else growth(pipeline, size, size)
    made, start = [], time.perf_counter()
    with redilated(pipeline.unet, factors, damping=damping or 0.0):
        for first in tqdm(range(0, len(texts), batch_size), desc=f"{size} px", unit="batch"):
            part = texts[first : first + batch_size]
            generators = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
            options = {"height": size, "width": size, "generator": generators, "output_type": "pt"}
            images = pipeline(part, num_inference_steps=steps, guidance_scale=guidance, **options).images
            made.append(images.float().cpu())
    return torch.cat(made), (time.perf_counter() - start) / len(texts)


@torch.no_grad()
def objects(judge: Judge, images: torch.Tensor) -> torch.Tensor:
    """(N,) how many objects the judge sees: cells that show one and are the surest within two cells."""
    score = 1 - judge(images)["cells"].softmax(1)[:, -1]
    surest = F.max_pool2d(score[:, None], 5, 1, 2)[:, 0]
    return ((score == surest) & (score > 0.5)).flatten(1).sum(1)


def close_ups(judge: Judge, images: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) around the object of each image (N, 3, S, S), S >= 64, at the image's own resolution.

    The judge finds the object in the reduced image. The window has 64 px, or more where the object would not
    fit into it. Of a larger window single pixels are taken: a mean of several would hide the grain.
    """
    side = images.shape[-1]
    found = judge.read(F.interpolate(images, size=OWN, mode="area"))
    windows = []
    for image, center, size in zip(images, found.center[:, 0], found.size[:, 0], strict=True):
        window = min(side, max(OWN, round(size.item() * side / CLOSE_UP)))
        left, top = (round(min(max(x * side - window / 2, 0), side - window)) for x in center.tolist())
        part = image[None, :, top : top + window, left : left + window]
        windows.append(F.interpolate(part, size=OWN, mode="nearest-exact"))
    return torch.cat(windows)


def grain(images: torch.Tensor) -> torch.Tensor:
    """(N,) how grainy the background of images (N, 3, H, W) in [0, 1] is, in 8-bit steps.

    It is what differs from the mean of 3 x 3 pixels, as root mean square in each square of 8 px; of all
    squares of an image the lower quartile counts, since the background fills more than a quarter.
    """
    mean = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    power = F.avg_pool2d((images - mean).square().mean(1, keepdim=True), SQUARE)
    return 255 * power.flatten(1).quantile(0.25, dim=1).sqrt()


def read(judge: Judge, images: torch.Tensor, captions: list[Caption]) -> dict[str, float]:
    """What images (N, 3, S, S) in [0, 1] show of their captions.

    Returns:
        Shares of images: ``alignment``, all is right in the reduced image; ``close_up``, the object is
        recognised at the image's own resolution; ``clean``, the grain is below ``GRAIN_LIMIT``; ``right``,
        all three. And means: ``objects`` that the judge sees in the reduced image; ``grain`` in 8-bit steps.
    """
    small, columns = F.interpolate(images, size=OWN, mode="area"), stated(captions)
    level = grain(images)
    shares = {
        "alignment": attributes_right(judge.read(small), columns)["all"],
        "close_up": attributes_right(judge.read(close_ups(judge, images)), columns)["emoji"],
        "clean": level < GRAIN_LIMIT,
    }
    shares["right"] = torch.stack(list(shares.values())).all(0)
    means = {name: share.double().mean().item() for name, share in shares.items()}
    return means | {"objects": objects(judge, small).double().mean().item(), "grain": level.mean().item()}


def main(options: Options) -> None:
    """Measure, print, write JSON and picture."""
    if options.samples < 1:
        raise WadiError("--samples: must be at least 1")
    check_image_path(options.picture, "--picture", overwrite=True)
    pipeline = load_for_steps(teacher_folder(), student_folder(), 1, device=options.device)
    pipeline.set_progress_bar_config(disable=True)
    judge = Judge.load(assets_folder() / "judge.safetensors")
    drawn = sample_captions(3 * options.samples, "test")
    captions = [caption for caption in drawn if len(caption.emoji) == 1][: options.samples]
    rows = measured(pipeline, 1, captions, (None, 0.0, *options.damping), judge, options)
    if options.teacher_samples:
        teacher = load_for_steps(teacher_folder(), None, STEPS, device=options.device)
        teacher.set_progress_bar_config(disable=True)
        rows += measured(teacher, STEPS, captions[: options.teacher_samples], (0.0,), judge, options)
    print("\n".join(map(str, rows)))
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    header = f"captions of one object, {device}, torch {torch.__version__}, {date.today()}"
    write_json(options.out, {"header": header, "rows": rows, "summary": summary(rows)})
    save_pictures(pipeline, options)


def measured(
    pipeline: DiffusionPipeline,
    steps: int,
    captions: list[Caption],
    ways: tuple[float | None, ...],
    judge: Judge,
    options: Options,
) -> list[dict]:
    """A row for each size and way: the damping of `pictures`."""
    rows, texts = [], [caption.text for caption in captions]
    pictures(pipeline, texts[:1], OWN, None, 1, steps)  # not timed: the first is slow
    for size in (OWN, *options.sizes):
        for damping in (None,) if size <= OWN else ways:
            images, seconds = kept(pipeline, texts, size, damping, steps, options)
            figures = read(judge, images, captions[: len(images)])
            figures |= {"samples": len(images), "seconds": seconds}
            row = {"steps": steps, "size": size, "redilated": damping is not None, "damping": damping}
            rows.append(row | {name: round(value, 6) for name, value in figures.items()})
    return rows


def kept(
    pipeline: DiffusionPipeline,
    texts: list[str],
    size: int,
    damping: float | None,
    steps: int,
    options: Options,
) -> tuple[torch.Tensor, float]:
    """As `pictures`, rounded to 8 bits; of those that --images holds already, as many as there are."""
    way = "plain" if damping is None else f"redilated-{damping:g}"
    path = options.images and options.images / f"{steps}-steps-{size}-{way}.safetensors"
    if path and path.exists():
        found = load_tensors(path)
    else:
        images, seconds = pictures(pipeline, texts, size, damping, options.batch_size, steps)
        pixels = (255 * images).round().to(torch.uint8)
        found = {"images": pixels, "seconds": torch.tensor(seconds, dtype=torch.float64)}
        if path:
            save_tensors(path, found)
    return found["images"][: len(texts)].float() / 255, found["seconds"].item()


def summary(rows: list[dict]) -> list[dict]:
    """Rows of the table of docs/uses.md: re-dilated pictures of each size."""
    found = []
    for size in sorted({row["size"] for row in rows if row["redilated"]}):
        own = {row["steps"]: row for row in rows if row["size"] == size and row["damping"] == 0.0}
        student, teacher = own[1], own.get(STEPS)
        found.append(
            {
                "use": f"images {size / OWN:g} times as high and wide",
                "measure": "all right at its own resolution, re-dilated (up)",
                "teacher": teacher and teacher["right"],
                "student": student["right"],
                "time_ratio": teacher and round(teacher["seconds"] / student["seconds"], 1),
            }
        )
    return found


def save_pictures(pipeline: DiffusionPipeline, options: Options) -> None:
    """A row for each of `SHOWN`: at the own size, then at each other one plain and re-dilated."""
    rows, largest = [], max(options.sizes)
    cases = [(OWN, None), *((size, damping) for size in options.sizes for damping in (None, 0.0))]
    for text in SHOWN:
        cells = []
        for size, damping in cases:
            image, _ = pictures(pipeline, [text], size, damping, 1)
            shown = F.interpolate(image, size=largest, mode="nearest")
            cells += pipeline.image_processor.postprocess(2 * shown - 1, output_type="pil")
        rows.append((text, cells))
    names = [f"{size} px" + (", re-dilated" if damping is not None else "") for size, damping in cases]
    save_image(labelled_grid(rows, names), options.picture, overwrite=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
