"""A sheet of 24 images of every use, seeds 0 to 23, none chosen; who looks at them says how many are right.

    python experiments/sheets.py                # all that needs no training
    python experiments/sheets.py --subject-adapter RUN/adapter --word RUN   # of wadi dreambooth, wadi invert
    python experiments/uses.py                  # then: the tables of docs/uses.md

docs/results/sheets.json has the prompt of each image, row by row. The numbers of the images that are right
are written there by hand, under "right" (0 is the first); while a sheet stays as it is, they are kept. A use
that starts from an image, or from edges, shows these left of each result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from control import draw as draw_conditions
from control import edges_of
from control import generator as steered
from editing import added, best, in_batches, repainted, replaced, varied
from high_resolution import pictures as of_size
from PIL import Image
from prompts import KINDS
from prompts import drawn as drawn_prompts

from wadi.emoji import CONTROLNET_SCALE, controlnet_folder, student_folder, teacher_folder
from wadi.emoji.captions import sample_captions
from wadi.emoji.evaluate import evaluation_captions, pipeline_generator
from wadi.emoji.examples import relation_caption, relation_pairs
from wadi.emoji.glyphs import load_atlas
from wadi.emoji.subject import subject_captions
from wadi.errors import WadiError
from wadi.files import read_json, write_json
from wadi.onestep import save_image
from wadi.onestep.pipeline import load_for_steps
from wadi.tasks import load_controlnet, with_controlnets
from wadi.tasks.dreambooth import load_with_adapters
from wadi.tasks.editing import CANDIDATES, Sampling

COUNT, COLUMNS, GAP = 24, 6, 2
"""Images of a sheet, images of a row, and pixels between them."""
STEPS, GUIDANCE = 25, 2.0
"""Of the teacher."""

Made = tuple[list[str], torch.Tensor]
"""24 prompts, and what the sheet shows of each: (24, 3, H, W) in [0, 1]."""


@dataclass
class Options:
    """Make sheets of 24 images that nobody chose."""

    only: tuple[str, ...] = ()
    """Names of sheets; all if not given."""
    subject_adapter: Path | None = None
    """Adapter of wadi dreambooth for the word zwx; without it there are no sheets of a subject."""
    word: Path | None = None
    """Folder of wadi invert with the word <R> for "side by side"; without it there is no sheet of a word."""
    atlas: Path | None = None
    """Atlas file of `wadi emoji atlas`; drawn from the font if not given."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the images are made."""
    folder: Path = Path("docs/images/sheets")
    """Folder of the sheets."""
    out: Path = Path("docs/results/sheets.json")
    """Prompts, and which images are right."""


def student(options: Options, *more: Path):
    """The built-in student, with more adapters stacked on it."""
    return load_for_steps(teacher_folder(), [student_folder(), *more], 1, device=options.device)


def teacher(options: Options):
    """The built-in teacher."""
    return load_for_steps(teacher_folder(), None, STEPS, device=options.device)


def painted(pipeline: Any, texts: list[str], steps: int = 1) -> Made:
    """Image i from seed i."""
    generate = pipeline_generator(pipeline, steps, 1.0 if steps == 1 else GUIDANCE)
    return texts, generate(texts, list(range(COUNT))).float().cpu() / 255


def generated(options: Options) -> Made:
    """Captions of the test set."""
    return painted(student(options), [caption.text for caption in evaluation_captions("test", COUNT)])


def larger(steps: int) -> Callable[[Options], Made]:
    """Twice as high and wide, re-dilated; captions of one object of the test set."""

    def build(options: Options) -> Made:
        captions = [caption for caption in sample_captions(4 * COUNT, "test") if len(caption.emoji) == 1]
        texts = [caption.text for caption in captions[:COUNT]]
        pipeline = student(options) if steps == 1 else teacher(options)
        pipeline.set_progress_bar_config(disable=True)
        return texts, of_size(pipeline, texts, 128, 0.0, COUNT, steps)[0]

    return build


def controlled(options: Options) -> Made:
    """Edges of held-out scenes, and the images that are to keep to them."""
    from control import Options as ControlOptions

    chosen = ControlOptions(samples=COUNT, atlas=options.atlas, device=options.device)
    captions, _, scenes = draw_conditions(chosen)
    maps, texts = edges_of(scenes), [caption.text for caption in captions]
    pipeline = student(options)
    controlnet = load_controlnet(str(controlnet_folder()), pipeline).to(options.device)
    generate = steered(with_controlnets(pipeline, [controlnet]), 1, CONTROLNET_SCALE)
    conditions = [Image.fromarray(edges.numpy()).convert("RGB") for edges in maps]
    images = generate(texts, conditions, list(range(COUNT)))
    return texts, beside(maps[:, None].expand(-1, 3, -1, -1).float() / 255, images.float() / 255)


def edited(options: Options) -> Made:
    """Scenes, and with another object in place of theirs (image to image)."""
    edit = replaced(COUNT, load_atlas(options.atlas))
    images = in_batches(varied(student(options), Sampling(0.6)), edit, COUNT, "image to image")
    return edit.texts, beside(edit.images, images)


def inpainted(make: Callable, strength: float) -> Callable[[Options], Made]:
    """Scenes, and repainted: the best of 8 candidates."""

    def build(options: Options) -> Made:
        edit = make(COUNT, load_atlas(options.atlas))
        way = repainted(student(options), Sampling(strength))
        made = [in_batches(way, edit, COUNT, "inpainting", seed=10_000 * i) for i in range(CANDIDATES)]
        return edit.texts, beside(edit.images, best(made, edit.masks))

    return build


def subject(options: Options) -> Made:
    """The new subject, by the teacher."""
    adapters = [options.subject_adapter]
    pipeline = load_with_adapters(str(teacher_folder()), adapters, device=options.device)
    return painted(pipeline, subject_captions(COUNT, "test")[0], STEPS)


def stacked(options: Options) -> Made:
    """The new subject, stacked on the student."""
    return painted(student(options, options.subject_adapter), subject_captions(COUNT, "test")[0])


def worded(options: Options) -> Made:
    """A relation as a new word, of pairs that training never showed."""
    pipeline = student(options)
    pipeline.load_textual_inversion(str(options.word / "learned_embeds.safetensors"), token="<R>")
    return painted(pipeline, [relation_caption(pair, "<R>") for pair in relation_pairs(COUNT, 0, True)])


def prompted(taught: bool) -> Callable[[Options], Made]:
    """As many prompts of each kind of the table: held-out combinations, or what training never taught."""
    kinds = [kind for kind in KINDS if kind.taught == taught and (kind.held_out or not taught)]

    def build(options: Options) -> Made:
        asked = [prompt for kind in kinds for prompt in drawn_prompts(kind, COUNT // len(kinds))]
        return painted(student(options), [prompt.text for prompt in asked])

    return build


@dataclass(frozen=True)
class Sheet:
    """What makes a sheet, when one of its images is right, and the option that it cannot be made without."""

    build: Callable[[Options], Made]
    looked_for: str
    needs: str = ""


CLEAR = "one can tell what each object is"
"""Of every sheet."""
SHEETS = {
    "generate": Sheet(generated, f"{CLEAR}; all is as the prompt says"),
    "larger-teacher": Sheet(larger(STEPS), f"{CLEAR}; all is as the prompt says; no speckle"),
    "larger": Sheet(larger(1), f"{CLEAR}; all is as the prompt says; no speckle"),
    "control": Sheet(controlled, f"{CLEAR}; each is where its edges are"),
    "image-to-image": Sheet(edited, f"{CLEAR}; background, place and size are kept"),
    "inpaint-replace": Sheet(inpainted(replaced, 0.8), f"{CLEAR}; place and size are kept; no frame shows"),
    "inpaint-add": Sheet(inpainted(added, 1.0), f"{CLEAR}; no frame shows"),
    "subject-teacher": Sheet(subject, f"{CLEAR}: the subject", "subject_adapter"),
    "subject-stacked": Sheet(stacked, f"{CLEAR}: the subject", "subject_adapter"),
    "word": Sheet(worded, f"{CLEAR}; they are side by side", "word"),
    "prompts": Sheet(prompted(taught=True), f"{CLEAR}; all is as the prompt says"),
    "prompts-beyond": Sheet(prompted(taught=False), f"{CLEAR}; all is as the prompt says"),
}
"""By the name of the sheet. Strengths are those with the best figures in docs/uses/editing.md. All are
of the student, but for two of the teacher in 25 steps."""


def beside(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, 2 W): two images side by side."""
    return torch.cat([left, right], 3)


def sheet(images: torch.Tensor) -> Image.Image:
    """Images (N, 3, H, W) in [0, 1], N a multiple of `COLUMNS`, in rows, with a white gap after each."""
    framed = torch.nn.functional.pad(images, (0, GAP, 0, GAP), value=1.0)
    rows = [torch.cat(list(row), 2) for row in framed.split(COLUMNS)]
    pixels = (255 * torch.cat(rows, 1)).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def entry(
    name: str, path: Path, texts: list[str], before: dict[str, Any] | None, same: bool
) -> dict[str, Any]:
    """What the JSON says of a sheet; what was called right holds only for the same images and prompts."""
    kept = before is not None and same and before["prompts"] == texts
    right = before["right"] if kept else None
    return {"sheet": path.name, "looked_for": SHEETS[name].looked_for, "right": right, "prompts": texts}


def write(name: str, made: Made, options: Options, found: dict[str, Any]) -> None:
    """Write a sheet; tell where it changed, since its images must be looked at again."""
    texts, images = made
    path = options.folder / f"{name}.{'jpg' if images.shape[-2] > 64 else 'png'}"
    old = Image.open(path).convert("RGB") if path.exists() else None
    save_image(sheet(images), path)
    with Image.open(path) as new:
        # another machine rounds otherwise
        same = old is not None and old.size == new.size and np.abs(np.int16(old) - np.int16(new)).max() <= 4
    found[name] = entry(name, path, texts, found.get(name), same)
    if found[name]["right"] is None:
        print(f'{path}: look at it, and write which images are right into {options.out}, "{name}"')


def main(options: Options) -> None:
    """Make the sheets."""
    if unknown := set(options.only) - set(SHEETS):
        raise WadiError(f"--only {min(unknown)}: known are {', '.join(SHEETS)}")
    found = read_json(options.out) if options.out.exists() else {}
    for name, one in SHEETS.items():
        if options.only and name not in options.only:
            continue
        if one.needs and getattr(options, one.needs) is None:
            print(f"{name}: needs --{one.needs.replace('_', '-')}; it is omitted", file=sys.stderr)
            continue
        write(name, one.build(options), options, found)
        write_json(options.out, found)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except WadiError as error:
        sys.exit(f"error: {error}")
