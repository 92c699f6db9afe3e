"""The captions of an evaluation, chosen by a seed and therefore the same on every machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from wadi.errors import WadiError
from wadi.files import explain_os_errors
from wadi.tables import SUFFIXES, read_texts


@dataclass(frozen=True)
class Chosen:
    """The chosen captions; image i is of caption i."""

    captions: tuple[str, ...]
    file_sha256: str
    """SHA-256 of the captions file."""
    choice_sha256: str
    """SHA-256 of the chosen captions, each followed by a line break."""


def choose_captions(path: Path, count: int, seed: int, column: str = "caption") -> Chosen:
    """Read captions, and choose `count` of them without repetition; the choice depends on `seed` alone.

    Args:
        path: COCO's annotations (.json), of which the caption with the lowest id of each image is used; or
            another file of prompts as for training, in which equal captions count once.
        count: number of captions. They stay in the order of the file.
        seed: seed of the choice.
        column: key or column of the captions in tables.

    Raises:
        WadiError: the file is unreadable, has no captions, or fewer than `count`.
    """
    with explain_os_errors(path, "read the captions"):
        file_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix.lower() not in SUFFIXES:
        raise WadiError(f"{path}: is not a file of captions; name one of {', '.join(SUFFIXES)}")
    captions = [caption.text for caption in read_texts(path, column)]
    if path.suffix.lower() != ".json":  # in which equal captions may belong to several images
        captions = list(dict.fromkeys(captions))
    if len(captions) < count:
        raise WadiError(
            f"{path}: has {len(captions)} captions, fewer than --num-samples {count}; ask for fewer"
        )
    if len(captions) > count:
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))[:count]
        captions = [captions[i] for i in order.sort().values.tolist()]
    text = "".join(f"{caption}\n" for caption in captions)
    return Chosen(tuple(captions), file_sha256, hashlib.sha256(text.encode()).hexdigest())
