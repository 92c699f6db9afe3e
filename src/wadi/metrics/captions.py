"""The captions of an evaluation, and which of them are used: the same on every machine."""

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
    """Captions in the order in which images are numbered."""

    captions: tuple[str, ...]
    file_sha256: str
    """SHA-256 of the captions file."""
    choice_sha256: str
    """SHA-256 of the chosen captions, each with a line end."""


def choose_captions(path: Path, count: int, seed: int, column: str = "caption") -> Chosen:
    """Read captions and draw `count` of them without repetition, by `seed` alone.

    Args:
        path: COCO's annotations (.json, at most one caption of each image, the one with the lowest id), or
            another file of prompts as for training. Except of .json, equal captions count once.
        count: how many; all in their order if there are no more.
        seed: of the choice.
        column: key or column of the caption in tables.

    Raises:
        WadiError: the file is unreadable, has no captions, or fewer than `count`.
    """
    with explain_os_errors(path, "read the captions"):
        file_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix.lower() not in SUFFIXES:
        raise WadiError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)}")
    captions = [caption.text for caption in read_texts(path, column)]
    if path.suffix.lower() != ".json":  # there equal captions may be of several images
        captions = list(dict.fromkeys(captions))
    if len(captions) < count:
        raise WadiError(f"{path}: {len(captions)} captions, fewer than --num-samples {count}; ask for fewer")
    if len(captions) > count:
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))[:count]
        captions = [captions[i] for i in order.sort().values.tolist()]
    text = "".join(f"{caption}\n" for caption in captions)
    return Chosen(tuple(captions), file_sha256, hashlib.sha256(text.encode()).hexdigest())
