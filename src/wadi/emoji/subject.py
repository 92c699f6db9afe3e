"""A subject that the teacher never saw: images of it, and a recogniser that finds it in other images.

The judge knows 72 emoji and nothing else. The recogniser is a logistic regression on the judge's features at
the place of the object. A model that does not know a subject often makes a shapeless spot of its colours, a
blot. So the recogniser also learns to refuse images of the subject that are blurred, or whose patches changed
places.
"""

from __future__ import annotations

import math
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
from wadi.emoji.judge import Judge, Reading, attributes_right
from wadi.emoji.scenes import render, sample_scenes, to_bytes
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
"""Size, place and background of the six images of a subject."""

CERTAIN = 0.9
"""Least probability at which a recogniser says that an object is its subject."""

UNSEEN_WORDS = ("sks", "blorp", "wug", "xqv", "dax", "kiv")
"""Words that the models do not know; a recogniser must refuse what a student makes of them."""


@dataclass
class SubjectExamplesConfig:
    """Write six images of one emoji, to teach it with wadi dreambooth."""

    out: Path
    """Folder to write; it must be new or empty."""
    character: str | None = None
    """The emoji, such as 🦩. If it is not given, the images of a hedgehog that come with wadi are copied,
    which needs no font."""
    font: Path = Path(FONT_FILE)
    """File of the bitmap font Noto Color Emoji."""
    seed: int = 0
    """Seed of everything that is random."""
    overwrite: bool = False
    """Replace the folder if this command wrote it and nothing else is in it."""


def examples_folder() -> Path:
    """Folder of the images that come with wadi of a subject that the teacher never saw, a hedgehog."""
    return assets_folder() / "subject"


def subject_examples(config: SubjectExamplesConfig) -> None:
    """Write the folder that `wadi dreambooth` reads.

    Raises:
        WadiError: the teacher knows the emoji already, the emoji cannot be drawn, or the folder may not or
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
        for i, image in enumerate(example_images(glyphs[0], config.seed)):
            image.save(temporary / f"{i}.png", optimize=True)


def draw_subjects(characters: Sequence[str], font: str | os.PathLike = FONT_FILE) -> torch.Tensor:
    """Draw emoji that the teacher was not trained on.

    Returns:
        uint8 (N, 4, 96, 96), as from `wadi.emoji.glyphs.draw_atlas`.

    Raises:
        WadiError: the teacher knows an emoji already, it is more than one character, or the font lacks it.
    """
    for character in characters:
        plain = character.removesuffix("\ufe0f")
        if len(plain) != 1:
            raise WadiError(f"--character {character!r}: must be one emoji")
        known = [name for name, own in EMOJI.items() if own == plain]
        if known:
            raise WadiError(f"--character {character}: the built-in teacher knows the {known[0]} already")
    return draw_atlas(font, [character.removesuffix("\ufe0f") for character in characters])


def example_images(glyph: torch.Tensor, seed: int = 0) -> list[Image.Image]:
    """Six images (64 x 64) of a glyph (4, 96, 96), with the sizes, places and backgrounds of `EXAMPLES`."""
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
    pixels = to_bytes(render(scenes, glyph[None]))
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


@torch.no_grad()
def object_features(judge: Judge, images: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """Features of the most certain object, from the outputs of all layers of the judge.

    The first layers see texture, and the last layers see shape.

    Args:
        judge: the judge, on the device that computes.
        images: (N, 3, 64, 64), uint8, or float in [0, 1].
        batch_size: images in a forward pass.

    Returns:
        (N, 2752) float32 on the judge's device: for each of the five layers, mean and standard deviation
        within the object's box; for the three layers in the middle, also the mean of each quarter of the box.
    """
    found = []
    for batch in images.split(batch_size):
        reading, layers = _read_layers(judge, batch)
        center, size = reading.center[:, 0], reading.size[:, :1]
        parts = []
        for x in layers:
            mean, square = (_box_mean(value, center, size) for value in (x, x.square()))
            parts += [mean, (square - mean.square()).clamp(min=0).sqrt()]
        corners = center.new_tensor([(-1, -1), (1, -1), (-1, 1), (1, 1)]) / 4
        for x in layers[1:4]:
            parts += [_box_mean(x, center + corner * size, size / 2) for corner in corners]
        found.append(torch.cat(parts, 1))
    return torch.cat(found)


def _read_layers(judge: Judge, images: torch.Tensor) -> tuple[Reading, list[torch.Tensor]]:
    """What the judge reads in images, and the outputs (N, C, S, S) of its five layers."""
    layers: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output: layers.append(output))
        for layer in (judge.stem, *judge.blocks)
    ]
    try:
        reading = judge.read(images, batch_size=len(images))
    finally:
        for handle in handles:
            handle.remove()
    return reading, [*layers[:-1], F.silu(judge.norm(layers[-1]))]


def _box_mean(x: torch.Tensor, center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Mean (N, C) of x (N, C, S, S) over boxes, whose centers (N, 2) and sizes (N, 1) are fractions of S."""
    side = x.shape[-1]
    axis = (torch.arange(side, device=x.device) + 0.5) / side
    # (N, 2, S): share of each pixel's width and height that is inside the box
    within = ((size[..., None] / 2 - (axis - center[..., None]).abs()) * side + 0.5).clamp(0, 1)
    columns, rows = (within / within.sum(-1, keepdim=True).clamp(min=1e-6)).unbind(1)
    return torch.einsum("nch,nh->nc", torch.einsum("nchw,nw->nch", x, columns), rows)


def blurred(images: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Blur images (N, 3, H, W), each by a Gaussian whose standard deviation (N,) is in pixels."""
    radius = math.ceil(3 * deviation.max().item())
    offset = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-offset.square() / (2 * deviation.square())[:, None], 1).repeat_interleave(3, 0)
    x = F.pad(images, (radius,) * 4, mode="replicate").flatten(0, 1)[None]
    x = F.conv2d(x, kernel[:, None, None, :], groups=len(kernel))
    return F.conv2d(x, kernel[:, None, :, None], groups=len(kernel)).view_as(images)


def shuffled(image: torch.Tensor, box: tuple[int, int, int], patch: int, generator: torch.Generator):
    """Copy an image (3, H, W), and put the patches of a box into another order.

    Args:
        image: the image; it is not changed.
        box: left, top and side in pixels; the side is a multiple of `patch`.
        patch: side of the patches in pixels, at most half the side of the box.
        generator: source of the randomness.
    """
    left, top, side = box
    where = (slice(None), slice(top, top + side), slice(left, left + side))
    count = side // patch
    patches = image[where].reshape(3, count, patch, count, patch).transpose(2, 3).flatten(1, 2)
    order = before = torch.arange(count * count, device=image.device)
    while torch.equal(order, before):
        order = torch.randperm(count * count, generator=generator, device=image.device)
    patches = patches[:, order].view(3, count, count, patch, patch)
    result = image.clone()
    result[where] = patches.transpose(2, 3).reshape(3, side, side)
    return result


@torch.no_grad()
def blots(judge: Judge, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Make blots: images with the colours and the size of a subject that do not show it.

    Args:
        judge: finds the subject.
        images: (N, 3, 64, 64) float in [0, 1] of the subject, on the generator's device.
        generator: source of the randomness.

    Returns:
        (5 N, 3, 64, 64): the images blurred by 1.5 to 4 pixels; the object's box shuffled in 2 x 2 patches,
        and in 3 x 3 patches; and twice the whole image shuffled in patches of 16 pixels.
    """
    side = images.shape[-1]
    drawn = torch.rand(len(images), generator=generator, device=images.device)
    reading = judge.read(images)

    def in_patches(i: int, count: int) -> torch.Tensor:
        patch = max(1, round(reading.size[i, 0].item() * side / count))
        own = min(count * patch, side // patch * patch)
        left, top = (
            round(min(max(x * side - own / 2, 0), side - own)) for x in reading.center[i, 0].tolist()
        )
        return shuffled(images[i], (left, top, own), patch, generator)

    found = [in_patches(i, count) for count in (2, 3) for i in range(len(images))]
    found += [shuffled(image, (0, 0, side), side // 4, generator) for _ in range(2) for image in images]
    return torch.cat([blurred(images, 1.5 + 2.5 * drawn), torch.stack(found)])


class Recogniser:
    """Tells whether the object of an image is the subject, by logistic regression on `object_features`.

    It learns to refuse other objects, and `blots` of the subject.

    Args:
        judge: computes the features.
        subject: (N, 3, 64, 64) images of the subject, float in [0, 1].
        others: (M, 3, 64, 64) images of other objects, float in [0, 1].
        weight_decay: weight decay of the coefficients of the standardised features.
    """

    def __init__(
        self, judge: Judge, subject: torch.Tensor, others: torch.Tensor, weight_decay: float = 1e-3
    ) -> None:
        self.judge = judge
        subject = subject.to(judge.stem.weight.device)
        none = blots(judge, subject, torch.Generator(subject.device).manual_seed(0))
        kinds = [object_features(judge, images) for images in (subject, others, none)]
        features = torch.cat(kinds)
        self.mean, self.std = features.mean(0), features.std(0).clamp_min(1e-6)
        x = (features - self.mean) / self.std
        label = torch.zeros(len(x), device=x.device)
        label[: len(subject)] = 1
        # each of the three kinds counts as much as the others, however many images it has
        weight = torch.cat([torch.full((len(kind),), 1 / len(kinds) / len(kind)) for kind in kinds]).to(x)
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
        """Whether (N,) bool the object of each image (N, 3, 64, 64) is the subject."""
        features = (object_features(self.judge, images) - self.mean) / self.std
        return torch.sigmoid(features @ self.weight + self.bias) > CERTAIN


def drawn_scenes(
    glyphs: torch.Tensor, count: int, seed: int, blemished: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random scenes with one object.

    Args:
        glyphs: (G, 4, 96, 96), on the device.
        count: number of scenes for each glyph.
        seed: seed of everything that is random.
        blemished: whether to add the blur and noise that the judge was trained with.

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
    """Captions of one object with the name `word`; size, place and background are each stated half the time.

    Returns:
        The captions, and what they state (`wadi.emoji.captions.stated`), where the emoji has no meaning.
    """
    rng = random.Random(f"wadi-emoji-subject-{seed}")

    def perhaps(values: Sequence[str]) -> int | None:
        return rng.randrange(len(values)) if rng.random() < 0.5 else None

    captions = [
        Caption(emoji=(0,), size=perhaps(SIZES), place=perhaps(PLACES), background=perhaps(COLOURS))
        for _ in range(count)
    ]
    return [caption.text.replace(NAMES[0], word) for caption in captions], stated(captions)


def unseen_captions(count: int, words: Sequence[str] = UNSEEN_WORDS) -> list[str]:
    """`count` captions of each of several words that no model knows."""
    return [text for word in words for text in subject_captions(count, f"unseen-{word}", word)[0]]


def distillation_prompts(word: str = "zwx", count: int = 2000) -> list[str]:
    """Prompts to distil a teacher that knows the subject: `count` captions of it, and as many others."""
    own, _ = subject_captions(count, "distill", word)
    others = prompts_file().read_text(encoding="utf-8").splitlines()
    return [*own, *others[:count]]


def subject_figures(
    recogniser: Recogniser, images: torch.Tensor, columns: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Measure images of `subject_captions`.

    Args:
        recogniser: recogniser of the subject.
        images: (N, 3, 64, 64) uint8.
        columns: what the captions state.

    Returns:
        Shares of the images in which the subject is ``recognised``; ``size``, ``place`` and ``background``
        are as stated, or free; and ``all`` of these four are right.
    """
    judge = recogniser.judge
    device = judge.stem.weight.device
    columns = {name: column.to(device) for name, column in columns.items()}
    right = attributes_right(judge.read(images), columns)
    found = {"recognised": recogniser(images)}
    found |= {name: right[name] for name in ("size", "place", "background")}
    found["all"] = torch.stack(list(found.values())).all(0)
    return {name: value.double().mean().item() for name, value in found.items()}
