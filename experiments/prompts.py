"""Alignment by kind of prompt: teacher in 25 guided steps against student in one, on held-out combinations.

    python experiments/prompts.py                  # the built-in pair; a GPU is quick, two cores take an hour
    python experiments/uses.py                     # then: the table of docs/uses/prompts.md

Kinds of the training grammar state combinations that no training has shown, where there are any: one pair of
objects in ten, and one background of ten for each object. Kinds beyond it are the same for both models: no
training has shown anything like them, and neither shows what the judge cannot read.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import tyro
from PIL import Image

from wadi.emoji import assets_folder, student_folder, teacher_folder
from wadi.emoji.captions import (
    COLOURS,
    PLACES,
    RELATIONS,
    SIZES,
    Caption,
    held_out_background,
    is_held_out_pair,
    stated,
    with_article,
)
from wadi.emoji.evaluate import Generate, generate_in_batches, pipeline_generator
from wadi.emoji.glyphs import NAMES
from wadi.emoji.judge import Judge, Reading, attributes_right
from wadi.errors import WadiError
from wadi.files import write_json
from wadi.onestep import check_image_path, labelled_grid, save_image
from wadi.onestep.pipeline import load_for_steps

STEPS, GUIDANCE = 25, 2.0
"""Of the teacher."""


@dataclass(frozen=True)
class Asked:
    """A prompt, and what of it the judge can look for.

    Attributes:
        text: the prompt.
        caption: objects, and what else the judge's own tests are for.
        smaller: which of two objects is asked to be the smaller one, 0 or 1.
        colour: index into ``COLOURS`` of a colour that is asked of an object.
    """

    text: str
    caption: Caption
    smaller: int | None = None
    colour: int | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of prompt.

    Attributes:
        name: for the table.
        draw: makes a prompt of it.
        taught: whether the training's grammar has it.
        held_out: whether what is drawn are combinations that training never showed.
    """

    name: str
    draw: Callable[[random.Random], Asked]
    taught: bool = True
    held_out: bool = False


def _object(rng: random.Random) -> int:
    return rng.randrange(len(NAMES))


def _pair(rng: random.Random) -> tuple[int, int]:
    """Two objects that training never shows together."""
    while True:
        first, second = rng.sample(range(len(NAMES)), 2)
        if is_held_out_pair(first, second):
            return first, second


def _single(size: bool = False, place: bool = False, background: bool = False) -> Callable:
    def draw(rng: random.Random) -> Asked:
        emoji = _object(rng)
        caption = Caption(
            emoji=(emoji,),
            size=rng.randrange(len(SIZES)) if size else None,
            place=rng.randrange(len(PLACES)) if place else None,
            background=held_out_background(emoji) if background else None,
        )
        return Asked(caption.text, caption)

    return draw


def _two(relation: str | None, background: bool = False) -> Callable:
    def draw(rng: random.Random) -> Asked:
        pair = _pair(rng)
        chosen = rng.choice(RELATIONS) if relation is None else relation
        colour = held_out_background(rng.choice(pair)) if background else None
        caption = Caption(emoji=pair, relation=RELATIONS.index(chosen), background=colour)
        return Asked(caption.text, caption)

    return draw


def _below(rng: random.Random) -> Asked:
    first, second = _pair(rng)
    text = f"{with_article(NAMES[first])} below {with_article(NAMES[second])}"
    return Asked(text, Caption(emoji=(second, first), relation=RELATIONS.index("above")))


def _sized_pair(rng: random.Random, colour: bool = False) -> Asked:
    pair, smaller = _pair(rng), rng.randrange(2)
    hue = rng.randrange(len(COLOURS)) if colour else None
    words = [SIZES[0] if i == smaller else SIZES[1] for i in range(2)]
    if hue is not None:
        words[0] += f" {COLOURS[hue]}"
    nouns = [with_article(NAMES[emoji], word) for emoji, word in zip(pair, words, strict=True)]
    caption = Caption(emoji=pair, relation=RELATIONS.index("above"))
    return Asked(" above ".join(nouns), caption, smaller, hue)


def _coloured(rng: random.Random) -> Asked:
    emoji, hue = _object(rng), rng.randrange(len(COLOURS))
    return Asked(with_article(NAMES[emoji], COLOURS[hue]), Caption(emoji=(emoji,)), colour=hue)


KINDS = (
    Kind("one object", _single()),
    Kind("with size", _single(size=True)),
    Kind("with place", _single(place=True)),
    Kind("with background", _single(background=True), held_out=True),
    Kind("with size, place and background", _single(True, True, True), held_out=True),
    Kind("two objects, and", _two("and"), held_out=True),
    Kind("two objects, left of", _two("left of"), held_out=True),
    Kind("two objects, above", _two("above"), held_out=True),
    Kind("two objects on a background", _two(None, background=True), held_out=True),
    Kind("two objects, below", _below, taught=False),
    Kind("two objects with sizes", _sized_pair, taught=False),
    Kind("an object with a colour", _coloured, taught=False),
    Kind("two objects with sizes, one with a colour", lambda rng: _sized_pair(rng, True), taught=False),
)


@dataclass
class Options:
    """Make pictures of every kind of prompt with teacher and student, and let the judge read them."""

    samples: int = 250
    """Prompts of each kind."""
    batch_size: int = 250
    """Pictures made at once."""
    timed: int = 8
    """Pictures that are made one by one, for the time of each."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the pictures are made."""
    out: Path = Path("docs/results/prompts.json")
    """Figures."""
    picture: Path = Path("docs/images/prompts.jpg")
    """A row for each kind: its first three prompts by the teacher, and by the student."""


def figures(reading: Reading, asked: Sequence[Asked]) -> dict[str, float]:
    """What the judge finds of what was asked.

    Returns:
        Shares of pictures: ``all`` of what can be read is right; the ``objects``; the ``relation``; and,
        where they are asked, ``sizes`` (the one that is to be smaller is) and ``leaked`` (the background has
        the colour that was asked of an object, by chance one in ten).
    """
    captions = [each.caption for each in asked]
    right = attributes_right(reading, stated(captions))
    whole = right["all"]
    shares = {"objects": right["emoji"], "relation": right["relation"]}
    if asked[0].smaller is not None:
        shares["sizes"] = _sizes_right(reading, asked)
        whole = whole & shares["sizes"]
    if asked[0].colour is not None:
        shares["leaked"] = reading.background == torch.tensor([each.colour for each in asked])
    return {name: value.double().mean().item() for name, value in ({"all": whole} | shares).items()}


def _sizes_right(reading: Reading, asked: Sequence[Asked]) -> torch.Tensor:
    """(N,) whether the object that is to be the smaller one is; objects are found by what they are."""
    first = torch.tensor([each.caption.emoji[0] for each in asked])
    crossed = (reading.emoji[:, 1] == first) & (reading.emoji[:, 0] != first)
    size = torch.where(crossed[:, None], reading.size.flip(1), reading.size)
    smaller = torch.tensor([each.smaller for each in asked])
    return (size[:, 0] < size[:, 1]) == (smaller == 0)


def drawn(kind: Kind, count: int) -> list[Asked]:
    """The prompts of a kind: the same in every run."""
    rng = random.Random(f"wadi-prompts-{kind.name}")
    return [kind.draw(rng) for _ in range(count)]


def seconds_each(ways: dict[str, Generate], texts: list[str], timed: int) -> dict[str, float]:
    """Median seconds of a picture alone, all ways in turn; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(timed + 1):
        for name, generate in ways.items():
            start = time.perf_counter()
            generate([texts[turn % len(texts)]], [turn]).cpu()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main(options: Options) -> None:
    """Measure, print, write JSON and picture."""
    if min(options.samples, options.timed, options.batch_size) < 1:
        raise WadiError("--samples, --timed, --batch-size: must be at least 1")
    check_image_path(options.picture, "--picture", overwrite=True)
    judge = Judge.load(assets_folder() / "judge.safetensors")
    teacher = load_for_steps(teacher_folder(), None, STEPS, device=options.device)
    student = load_for_steps(teacher_folder(), student_folder(), 1, device=options.device)
    ways = {
        "teacher": pipeline_generator(teacher, STEPS, GUIDANCE),
        "student": pipeline_generator(student, 1, 1.0),
    }
    rows, shown = [], []
    for number, kind in enumerate(KINDS):
        asked = drawn(kind, options.samples)
        texts = [each.text for each in asked]
        row = {"kind": kind.name, "example": texts[0], "taught": kind.taught, "held_out": kind.held_out}
        cells = []
        for name, generate in ways.items():
            print(f"{kind.name}: {name}", file=sys.stderr)
            images = generate_in_batches(generate, texts, 1000 * number, options.batch_size)
            row[name] = {key: round(value, 4) for key, value in figures(judge.read(images), asked).items()}
            cells += [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:3]]
        print(f"{kind.name:45} {row['teacher']['all']:.3f} {row['student']['all']:.3f}")
        rows.append(row)
        shown.append((" / ".join(texts[:3]), cells))
    seconds = seconds_each(ways, [row["example"] for row in rows], options.timed)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    header = f"{options.samples} prompts of each kind, {device}, torch {torch.__version__}, {date.today()}"
    found = {"header": header, "samples": options.samples, "seconds": seconds, "rows": rows}
    write_json(options.out, found | {"summary": summary(rows, seconds)})
    headings = (f"teacher: {STEPS} steps", "", "", "student: 1 step")
    save_image(labelled_grid(shown, headings), options.picture, overwrite=True)


def summary(rows: Sequence[dict], seconds: dict[str, float]) -> list[dict]:
    """Rows of the table of docs/uses.md: means over the kinds that training taught, and over the others."""
    ratio = round(seconds["teacher"] / seconds["student"], 1)
    found = []
    for taught, use in ((True, "prompts of several things"), (False, "prompts beyond the grammar")):
        chosen = [row for row in rows if row["taught"] == taught and (row["held_out"] or not taught)]
        means = {name: round(statistics.mean(row[name]["all"] for row in chosen), 4) for name in seconds}
        measure = f"all that the judge can read is right, mean of {len(chosen)} kinds (up)"
        found.append({"use": use, "measure": measure, **means, "time_ratio": ratio})
    return found


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except WadiError as error:
        sys.exit(f"error: {error}")
