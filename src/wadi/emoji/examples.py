"""`wadi emoji relation-examples`: images of two emoji in a relation that no caption of the training names.

A relation says where the first object is, seen from the second. The renderer draws it, and it is read from
the places and sizes that the judge finds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from wadi.emoji.captions import Caption, is_held_out_pair, stated, with_article
from wadi.emoji.glyphs import NAMES, load_atlas
from wadi.emoji.judge import Reading
from wadi.emoji.scenes import IN_PAIR, Scenes, render, sample_scenes, to_bytes
from wadi.errors import WadiError
from wadi.outputs import Output

Uniform = Callable[[float, float], torch.Tensor]
"""Draws (N,) float32, uniform between two bounds."""

Layout = tuple[torch.Tensor, torch.Tensor, float]
"""Centres (N, 2, 2), x and y of the first and the second object, and sizes (N, 2), as fractions of the
image's side; and a factor by which the angles of the objects are multiplied."""


@dataclass(frozen=True)
class Relation:
    """One relation: how it is drawn, and how it is read.

    Attributes:
        meaning: the relation in words.
        shown: whether some images of the training show the relation, though no caption names it.
        draw: returns a layout for N images.
        holds: returns (N,) bool from centres (N, 2, 2) and sizes (N, 2).
    """

    meaning: str
    shown: bool
    draw: Callable[[Uniform], Layout]
    holds: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _layout(first: tuple, second: tuple, sizes: tuple, turn: float = 1.0) -> Layout:
    center = torch.stack([torch.stack(first, 1), torch.stack(second, 1)], 1)
    return center, torch.stack(sizes, 1), turn


def _draw_below(uniform: Uniform) -> Layout:
    half, shift = uniform(0.23, 0.26), uniform(-0.02, 0.02)
    x, y = uniform(0.36, 0.64), 0.5 + shift
    first = (x + uniform(-0.1, 0.1), y + half)
    second = (x + uniform(-0.1, 0.1), y - half)
    return _layout(first, second, (uniform(*IN_PAIR), uniform(*IN_PAIR)))


def _draw_right(uniform: Uniform) -> Layout:
    center, size, turn = _draw_below(uniform)
    return center.flip(2), size, turn


def _draw_beside(uniform: Uniform) -> Layout:
    center, size, turn = _draw_right(uniform)
    swap = uniform(0.0, 1.0) < 0.5
    return torch.where(swap[:, None, None], center.flip(1), center), size, turn


def _draw_diagonal(uniform: Uniform) -> Layout:
    half = uniform(0.21, 0.25)
    x, y = 0.5 + uniform(-0.03, 0.03), 0.5 + uniform(-0.03, 0.03)
    return _layout((x - half, y - half), (x + half, y + half), (uniform(0.30, 0.38), uniform(0.30, 0.38)))


def _draw_on_top(uniform: Uniform) -> Layout:
    small, big = uniform(0.30, 0.34), uniform(0.48, 0.54)
    x, y = uniform(0.38, 0.62), 0.97 - big / 2
    first = (x + uniform(-0.04, 0.04), y - (small + big) / 2)
    return _layout(first, (x, y), (small, big), 0.5)


def _draw_corner(uniform: Uniform) -> Layout:
    small, big = uniform(0.28, 0.32), uniform(0.52, 0.58)
    first = (1 - small / 2 - uniform(0.0, 0.03), small / 2 + uniform(0.0, 0.03))
    second = (big / 2 + uniform(0.0, 0.04), 1 - big / 2 - uniform(0.0, 0.04))
    return _layout(first, second, (small, big))


def _apart(center: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far (N,) the first object is to the right of the second, and how far (N,) below it."""
    return (center[:, 0] - center[:, 1]).unbind(1)


def _is_below(center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    dx, dy = _apart(center)
    return dy > dx.abs()


def _is_right(center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    dx, dy = _apart(center)
    return dx > dy.abs()


def _is_beside(center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    dx, dy = _apart(center)
    return dx.abs() > dy.abs()


def _is_diagonal(center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    # in images of the training, the smaller of the two distances is at most 0.2
    dx, dy = _apart(center)
    return (dx < -0.25) & (dy < -0.25)


def _is_smaller(size: torch.Tensor) -> torch.Tensor:
    # in images of the training the sizes rarely differ by more; here they differ by at least 0.14
    return size[:, 1] - size[:, 0] > 0.10


def _is_on_top(center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    dx, dy = _apart(center)
    touching = (-dy - size.mean(1)).abs() < 0.10
    return (dx.abs() < 0.12) & (dy < 0) & touching & _is_smaller(size)


def _is_corner(center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return (
        _is_smaller(size)
        & (center[:, 0, 0] > 0.74)
        & (center[:, 0, 1] < 0.26)
        & _is_diagonal(torch.stack([-center[..., 0], center[..., 1]], 2), size)
    )


RELATIONS: dict[str, Relation] = {
    "beside": Relation("the two side by side, in either order", True, _draw_beside, _is_beside),
    "below": Relation("the first below the second", True, _draw_below, _is_below),
    "right-of": Relation("the first right of the second", True, _draw_right, _is_right),
    "diagonal": Relation(
        "the first at the upper left, the second at the lower right", False, _draw_diagonal, _is_diagonal
    ),
    "on-top": Relation("a small first one standing on a big second one", False, _draw_on_top, _is_on_top),
    "corner": Relation(
        "a small first one in the upper right corner, a big second one in the lower left",
        False,
        _draw_corner,
        _is_corner,
    ),
}
"""Relations that no caption of the emoji world names."""


def relation_pairs(count: int, seed: int | str, held_out: bool) -> list[tuple[int, int]]:
    """Different pairs of emoji, indices into ``NAMES``.

    Args:
        count: number of pairs.
        seed: the same seed gives the same pairs everywhere.
        held_out: whether the teacher's training never showed the pairs together.

    Raises:
        WadiError: there are not so many pairs.
    """
    pairs = [
        (a, b)
        for a in range(len(NAMES))
        for b in range(len(NAMES))
        if a != b and is_held_out_pair(a, b) == held_out
    ]
    if not 0 < count <= len(pairs):
        raise WadiError(f"--count {count}: must be from 1 to {len(pairs)}, the number of possible pairs")
    return random.Random(f"wadi-relation-{held_out}-{seed}").sample(pairs, count)


def relation_caption(pair: tuple[int, int], word: str) -> str:
    """A caption such as ``a panda <R> a rocket``."""
    first, second = (with_article(NAMES[index]) for index in pair)
    return f"{first} {word} {second}"


def relation_scenes(relation: str, pairs: list[tuple[int, int]], seed: int) -> Scenes:
    """Draw a scene for each pair; what the relation leaves free varies as in the training."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(stated([Caption(emoji=pair, relation=0) for pair in pairs]), generator)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pairs), generator=generator)

    scenes.center, scenes.size, turn = RELATIONS[relation].draw(uniform)
    scenes.angle = scenes.angle * turn
    return scenes


def relation_right(reading: Reading, pairs: torch.Tensor, relation: str) -> dict[str, torch.Tensor]:
    """Whether images show pairs of objects in a relation.

    Args:
        reading: of N images.
        pairs: (N, 2) int64, first and second object, on the same device.
        relation: a key of `RELATIONS`.

    Returns:
        (N,) bool: ``objects``, whether both objects are there; ``relation``, whether the relation holds too.
    """
    both, center, size = reading.found(pairs)
    return {"objects": both, "relation": both & RELATIONS[relation].holds(center, size)}


@dataclass
class RelationExamplesConfig:
    """Draw images of pairs of emoji in a relation that no caption of the training names, with captions."""

    out: Path
    """Folder to write: images and metadata.jsonl. It must be new or empty."""
    relation: Literal["beside", "below", "right-of", "diagonal", "on-top", "corner"] = "beside"
    """Where the first object is, seen from the second one."""
    count: int = 16
    """Number of images, each of another pair that the teacher's training may have shown."""
    word: str = "<R>"
    """Word that stands for the relation in the captions."""
    atlas: Path | None = None
    """Atlas file of `wadi emoji atlas`; if it is not given, the emoji are drawn from the font."""
    seed: int = 0
    """Seed of everything that is random."""
    overwrite: bool = False
    """Replace the folder if this command wrote it and nothing else is in it."""


def relation_examples(config: RelationExamplesConfig) -> None:
    """Write the folder that `wadi invert` reads.

    Raises:
        WadiError: too many images, neither font nor atlas, or the folder may not or cannot be written.
    """
    output = Output(config.out, "emoji relation-examples", (config.atlas,), config.overwrite)
    output.check()
    pairs = relation_pairs(config.count, config.seed, held_out=False)
    images = render(relation_scenes(config.relation, pairs, config.seed), load_atlas(config.atlas))
    pixels = to_bytes(images).permute(0, 2, 3, 1).numpy()
    with output.writing() as folder:
        lines = []
        for index, (pair, image) in enumerate(zip(pairs, pixels, strict=True)):
            name = f"{index:03d}.png"
            Image.fromarray(image).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": relation_caption(pair, config.word)}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{config.out}: {config.count} images, {RELATIONS[config.relation].meaning}")
