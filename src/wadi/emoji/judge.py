"""The judge: a small network that reads an image of the emoji world, and so scores a generator.

Its 128 features carry the Frechet distance and precision/recall; what it reads carries the alignment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from wadi.emoji import assets_folder
from wadi.emoji.captions import COLOURS
from wadi.emoji.glyphs import NAMES
from wadi.emoji.scenes import IMAGE_SIZE
from wadi.errors import WadiError
from wadi.files import load_tensors, save_tensors
from wadi.metrics.extractors import SPACES, Extractor, FeatureSpace

NUM_FEATURES = 128
GRID = 8
"""The image is read on an 8 x 8 grid of cells; an object belongs to the cell of its centre."""

SIZE_THRESHOLD = 0.50
"""Between the largest small and the smallest big object (scenes.SMALL, scenes.BIG), fraction of the side."""

PLACE_THRESHOLD = 0.36
"""Half-way between "in the center" (at most 0.12) and "on the left" (at least 0.6), in units of the room
that an object of its size has."""


@dataclass
class Reading:
    """What the judge sees in N images.

    Attributes:
        emoji: (N, 2) int64, classes of the strongest and the second strongest object.
        score: (N, 2) float32, probability that there is an object at all.
        center: (N, 2, 2) float32, x and y, fractions of the side.
        size: (N, 2) float32, fraction of the side.
        background: (N,) int64, index into ``COLOURS``.
        features: (N, 128) float32.
    """

    emoji: torch.Tensor
    score: torch.Tensor
    center: torch.Tensor
    size: torch.Tensor
    background: torch.Tensor
    features: torch.Tensor

    def found(self, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Look for pairs of objects, whichever of the two the judge names first.

        Args:
            pairs: (N, 2) int64, first and second object, on the reading's device.

        Returns:
            (N,) bool, whether both are there; centers (N, 2, 2) and sizes (N, 2) in the order of the pairs.
        """
        crossed = (self.emoji == pairs.flip(1)).all(1)
        center = torch.where(crossed[:, None, None], self.center.flip(1), self.center)
        size = torch.where(crossed[:, None], self.size.flip(1), self.size)
        return (self.emoji == pairs).all(1) | crossed, center, size

    @staticmethod
    def cat(readings: list[Reading]) -> Reading:
        """Join readings of several batches."""
        columns = zip(*(vars(reading).values() for reading in readings), strict=True)
        return Reading(*map(torch.cat, columns))


class _Block(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int = 2):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.down(x + self.conv2(F.silu(self.norm2(h))))


class Judge(nn.Module):
    """A network that reads images (N, 3, 64, 64) in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(
            _Block(32, 64), _Block(64, 128), _Block(128, 192), _Block(192, 192, stride=1)
        )
        self.norm = nn.GroupNorm(8, 192)
        self.cells = nn.Conv2d(192, len(NAMES) + 1 + 3, 1)
        self.squeeze = nn.Conv2d(192, 32, 1)
        self.project = nn.Linear(32 * GRID * GRID, NUM_FEATURES)
        self.present = nn.Linear(NUM_FEATURES, len(NAMES))
        self.background = nn.Linear(NUM_FEATURES, len(COLOURS))
        self.layout = nn.Linear(NUM_FEATURES, 3)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the outputs of all heads.

        Returns:
            ``cells`` (N, 73, 8, 8) class logits, the last for "no object"; ``box`` (N, 3, 8, 8) offset of the
            centre inside the cell and size; ``features`` (N, 128); ``present`` (N, 72) logits; ``background``
            (N, 10) logits; ``layout`` (N, 3) mean place and size of the objects.
        """
        x = F.silu(self.norm(self.blocks(self.stem(2 * images - 1))))
        cells = self.cells(x)
        features = self.project(F.silu(self.squeeze(x)).flatten(1))
        hidden = F.silu(features)
        return {
            "cells": cells[:, :-3],
            "box": cells[:, -3:].sigmoid(),
            "features": features.float() * self.feature_scale,
            "present": self.present(hidden),
            "background": self.background(hidden),
            "layout": self.layout(hidden),
        }

    @torch.no_grad()
    def read(self, images: torch.Tensor, batch_size: int = 500) -> Reading:
        """Read images.

        Args:
            images: (N, 3, 64, 64), uint8, or float in [0, 1].
            batch_size: images in a forward pass.

        Raises:
            WadiError: the images have another size.
        """
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            (height, width), own = images.shape[-2:], IMAGE_SIZE
            raise WadiError(
                f"--features emoji: reads images of {own} x {own} pixels, and these have {height} x {width}; "
                f"give --resolution {own}"
            )
        device = self.stem.weight.device
        readings = []
        for batch in images.split(batch_size):
            batch = batch.to(device)
            readings.append(self._read(batch.float() / 255 if batch.dtype == torch.uint8 else batch))
        return Reading.cat(readings)

    def _read(self, images: torch.Tensor) -> Reading:
        out = self(images)
        probability = out["cells"].softmax(1).flatten(2)
        score = 1 - probability[:, -1]
        column = torch.arange(GRID * GRID, device=images.device) % GRID
        row = torch.arange(GRID * GRID, device=images.device) // GRID
        box, batch = out["box"].flatten(2), torch.arange(len(images), device=images.device)
        emoji, scores, centers, sizes = [], [], [], []
        for _ in range(2):
            best, cell = score.max(1)
            emoji.append(probability[batch, :-1, cell].argmax(1))
            scores.append(best)
            dx, dy, size = box[batch, :, cell].unbind(1)
            centers.append(torch.stack([(column[cell] + dx) / GRID, (row[cell] + dy) / GRID], 1))
            sizes.append(size)
            # One object lights up neighbouring cells; two objects are at least 3.6 cells apart.
            near = (column - column[cell, None]).abs().maximum((row - row[cell, None]).abs()) <= 2
            score = score.masked_fill(near, -1.0)
        return Reading(
            emoji=torch.stack(emoji, 1),
            score=torch.stack(scores, 1).clamp(min=0),
            center=torch.stack(centers, 1),
            size=torch.stack(sizes, 1),
            background=out["background"].argmax(1),
            features=out["features"],
        )

    def save(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
        """Write the weights as safetensors."""
        save_tensors(path, {name: tensor.to(dtype) for name, tensor in self.state_dict().items()})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Judge:
        """Read a file of :meth:`save`; the network computes in float32."""
        judge, tensors = cls(), load_tensors(path)
        try:
            judge.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except RuntimeError as error:
            raise WadiError(
                f"{path}: not the weights of this judge; train it with `wadi emoji train-judge`"
            ) from error
        return judge.eval().requires_grad_(False)


def shipped_judge(device: str | torch.device = "cpu") -> Judge:
    """The judge that comes with wadi, on the device."""
    return Judge.load(assets_folder() / "judge.safetensors").to(device)


def place_in_room(center: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Places (N, 2) of objects in the room that each has: at -1 and 1 it touches the edges of the image.

    Args:
        center: (N, 2), fractions of the image's side.
        size: (N,), fractions of the image's side.
    """
    return (center - 0.5) / (0.5 - size[:, None] / 2).clamp(min=1e-3)


def attributes_right(reading: Reading, stated: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Which stated attributes the judge finds in the image; what a caption leaves free counts as right.

    Args:
        reading: of N images.
        stated: of their N captions (:func:`wadi.emoji.captions.stated`), on the same device.

    Returns:
        (N,) bool for ``emoji``, ``size``, ``place``, ``relation``, ``background``, and ``all`` of them.
    """
    both, center, _ = reading.found(stated["emoji"])
    single, size, relation = stated["emoji"][:, 1] < 0, stated["size"], stated["relation"]
    dx, dy = (center[:, 1] - center[:, 0]).unbind(1)
    right = {
        "emoji": both | (single & (reading.emoji[:, 0] == stated["emoji"][:, 0])),
        "size": (size < 0) | ((reading.size[:, 0] > SIZE_THRESHOLD) == (size == 1)),
        "place": _place_right(reading, stated["place"]),
        "relation": (relation <= 0) | torch.where(relation == 1, dx > dy.abs(), dy > dx.abs()),
        "background": (stated["background"] < 0) | (reading.background == stated["background"]),
    }
    right["all"] = torch.stack(list(right.values())).all(0)
    return right


def _place_right(reading: Reading, place: torch.Tensor) -> torch.Tensor:
    x, y = place_in_room(reading.center[:, 0], reading.size[:, 0]).unbind(1)
    centered = (x.abs() < PLACE_THRESHOLD) & (y.abs() < PLACE_THRESHOLD)
    tests = [x < -PLACE_THRESHOLD, x > PLACE_THRESHOLD, y < -PLACE_THRESHOLD, y > PLACE_THRESHOLD, centered]
    return (place < 0) | torch.stack(tests, 1).gather(1, place.clamp(min=0)[:, None])[:, 0]


def load_judge_features(device: str | torch.device = "cpu") -> Extractor:
    """The features of the judge that comes with wadi, on the device."""
    judge = shipped_judge(device)
    return lambda images: judge.read(images.to(device)).features.float().cpu()


SPACES["emoji"] = FeatureSpace(NUM_FEATURES, load_judge_features)
