"""A subject that the teacher never saw: its pictures, and a recogniser that reads it in other pictures.

The judge knows 72 emoji and no other. The recogniser is a logistic regression on what the judge's last layer
sees where the object is, fitted to drawn scenes alone: it never sees a picture that a model made.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from wadi.emoji import assets_folder, prompts_file
from wadi.emoji.captions import COLOURS, PLACES, SIZES, Caption, stated
from wadi.emoji.glyphs import EMOJI, FONT_FILE, NAMES, draw_atlas
from wadi.emoji.judge import Judge, attributes_right
from wadi.emoji.scenes import render, sample_scenes
from wadi.emoji.train_judge import blemish
from wadi.errors import WadiError
from wadi.outputs import Output

EXAMPLES = (
    ("big", "in the center", "blue"),
    ("small", "on the left", "yellow"),
    ("big", None, "green"),
    ("small", "at the top", "white"),
    ("big", None, "red"),
    ("small", "on the right", "purple"),
)
"""Size, place and background of the pictures of a subject."""


@dataclass
class SubjectExamplesConfig:
    """Write six pictures of one emoji, to teach it with wadi dreambooth."""

    out: Path
    """Folder to write; new or empty."""
    character: str | None = None
    """The emoji, such as 🦩; without one, the hedgehog whose pictures come with wadi: no font is needed."""
    font: Path = Path(FONT_FILE)
    """Noto Color Emoji, the bitmap build."""
    seed: int = 0
    """Of what the pictures vary in."""
    overwrite: bool = False
    """Replace the folder if this command wrote it and nothing else is in it."""


def examples_folder() -> Path:
    """The pictures of a subject that come with wadi: a hedgehog, which the teacher never saw."""
    return assets_folder() / "subject"


def subject_examples(config: SubjectExamplesConfig) -> None:
    """Write the pictures.

    Raises:
        WadiError: the emoji is one that the teacher knows, or cannot be drawn; or the folder may not or
            cannot be written.
    """
    inputs = (config.font, examples_folder())
    output = Output(config.out, "emoji subject-examples", inputs, config.overwrite)
    output.check()
    if config.character is None:
        with output.writing() as temporary:
            for path in sorted(examples_folder().glob("*.png")):
                shutil.copyfile(path, temporary / path.name)
        return
    glyphs = draw_subjects([config.character], config.font)
    with output.writing() as temporary:
        for i, picture in enumerate(example_pictures(glyphs[0], config.seed)):
            picture.save(temporary / f"{i}.png", optimize=True)


def draw_subjects(characters: Sequence[str], font: str | os.PathLike = FONT_FILE) -> torch.Tensor:
    """Draw emoji that the teacher was not trained on.

    Returns:
        uint8 (N, 4, 96, 96), as `wadi.emoji.glyphs.draw_atlas`.

    Raises:
        WadiError: one is known to the teacher, is more than one character, or the font lacks it.
    """
    for character in characters:
        plain = character.removesuffix("\ufe0f")
        if len(plain) != 1:
            raise WadiError(f"--character {character!r}: must be one emoji")
        known = [name for name, own in EMOJI.items() if own == plain]
        if known:
            raise WadiError(f"--character {character}: the built-in teacher knows the {known[0]} already")
    return draw_atlas(font, [character.removesuffix("\ufe0f") for character in characters])


def example_pictures(glyph: torch.Tensor, seed: int = 0) -> list[Image.Image]:
    """Six scenes (64 x 64) of a glyph (4, 96, 96): sizes, places and backgrounds of `EXAMPLES`."""
    captions = [
        Caption(
            emoji=(0,),
            size=SIZES.index(size),
            place=None if place is None else PLACES.index(place),
            background=COLOURS.index(background),
        )
        for size, place, background in EXAMPLES
    ]
    scenes = sample_scenes(stated(captions), torch.Generator().manual_seed(seed))
    pixels = (render(scenes, glyph[None]) * 255).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


@torch.no_grad()
def object_features(judge: Judge, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """What the judge's last convolutional layer sees of the strongest object.

    Args:
        judge: on the device where it is to work.
        images: (N, 3, 64, 64), uint8, or float in [0, 1].
        batch_size: pictures a forward pass.

    Returns:
        (N, 384) float32 on the judge's device: the cell of the object, and the mean of it and the eight
        around it.
    """
    found = []
    for batch in images.split(batch_size):
        batch = batch.to(judge.stem.weight.device)
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch
        x = F.silu(judge.norm(judge.blocks(judge.stem(2 * batch - 1))))
        score = 1 - judge.cells(x)[:, : len(NAMES) + 1].softmax(1)[:, -1]
        cell = score.flatten(1).argmax(1)[:, None, None].expand(-1, x.shape[1], 1)
        around = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        found.append(torch.cat([part.flatten(2).gather(2, cell)[..., 0] for part in (x, around)], 1))
    return torch.cat(found)


class Recogniser:
    """Tells whether the object of a picture is the subject: logistic regression on `object_features`.

    Args:
        judge: whose features it reads.
        subject: (N, 3, 64, 64) pictures of the subject.
        others: (M, 3, 64, 64) pictures of other objects.
        weight_decay: of the standardised features' coefficients.
    """

    def __init__(
        self, judge: Judge, subject: torch.Tensor, others: torch.Tensor, weight_decay: float = 1e-3
    ) -> None:
        self.judge = judge
        features = torch.cat([object_features(judge, subject), object_features(judge, others)])
        self.mean, self.std = features.mean(0), features.std(0).clamp_min(1e-6)
        x = (features - self.mean) / self.std
        label = torch.zeros(len(x), device=x.device)
        label[: len(subject)] = 1
        # both kinds count alike, however many there are
        weight = torch.where(label == 1, 0.5 / len(subject), 0.5 / len(others))
        self.weight = torch.zeros(x.shape[1], device=x.device, requires_grad=True)
        self.bias = torch.zeros((), device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-10
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            logits = x @ self.weight + self.bias
            loss = F.binary_cross_entropy_with_logits(logits, label, weight, reduction="sum")
            loss = loss + 0.5 * weight_decay * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(N,) bool: the object of each picture (N, 3, 64, 64) is the subject."""
        features = (object_features(self.judge, images) - self.mean) / self.std
        return features @ self.weight + self.bias > 0


def drawn_scenes(
    glyphs: torch.Tensor, count: int, seed: int, blemished: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes with one object, everything about it random.

    Args:
        glyphs: (G, 4, 96, 96), on the device.
        count: how many of each glyph.
        seed: of everything.
        blemished: with the blur and noise that the judge was trained with.

    Returns:
        (G count, 3, 64, 64) float32 in [0, 1], and which glyph each shows, (G count,) int64.
    """
    generator = torch.Generator(glyphs.device).manual_seed(seed)
    which = torch.arange(len(glyphs), device=glyphs.device).repeat_interleave(count)
    free = torch.full_like(which, -1)
    columns = dict.fromkeys(("size", "place", "relation"), free)
    background = torch.randint(len(COLOURS), which.shape, generator=generator, device=glyphs.device)
    emoji = torch.stack([which, free], 1)
    scenes = sample_scenes({**columns, "emoji": emoji, "background": background}, generator)
    images = torch.cat([render(scenes[i : i + 500], glyphs) for i in range(0, len(which), 500)])
    return (blemish(images, generator) if blemished else images), which


def subject_captions(
    count: int, seed: int | str, word: str = "zwx"
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Captions of one object that is called `word`; size, place and background are each stated half the time.

    Returns:
        The captions, and what they state (`wadi.emoji.captions.stated`); of the emoji there, nothing holds.
    """
    rng = random.Random(f"wadi-emoji-subject-{seed}")

    def perhaps(values: Sequence[str]) -> int | None:
        return rng.randrange(len(values)) if rng.random() < 0.5 else None

    captions = [
        Caption(emoji=(0,), size=perhaps(SIZES), place=perhaps(PLACES), background=perhaps(COLOURS))
        for _ in range(count)
    ]
    return [caption.text.replace(NAMES[0], word) for caption in captions], stated(captions)


def distillation_prompts(word: str = "zwx", count: int = 2000) -> list[str]:
    """Prompts to distil a customised teacher with: captions of the subject, and as many of the training's."""
    own, _ = subject_captions(count, "distill", word)
    others = prompts_file().read_text(encoding="utf-8").splitlines()
    return [*own, *others[:count]]


def subject_figures(
    recogniser: Recogniser, images: torch.Tensor, columns: dict[str, torch.Tensor]
) -> dict[str, float]:
    """What pictures of `subject_captions` show.

    Args:
        recogniser: of the subject.
        images: (N, 3, 64, 64) uint8.
        columns: what the captions state.

    Returns:
        Shares of the pictures: ``recognised``; ``size``, ``place`` and ``background`` as stated, or free;
        ``all`` of these four.
    """
    judge = recogniser.judge
    device = judge.stem.weight.device
    columns = {name: column.to(device) for name, column in columns.items()}
    right = attributes_right(judge.read(images), columns)
    found = {"recognised": recogniser(images)}
    found |= {name: right[name] for name in ("size", "place", "background")}
    found["all"] = torch.stack(list(found.values())).all(0)
    return {name: value.double().mean().item() for name, value in found.items()}
