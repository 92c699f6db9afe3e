"""The captions of an evaluation, and which of them are used: the same on every machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from wadi.distill.prompts import read_prompts
from wadi.errors import WadiError
from wadi.files import explain_os_errors, read_json


@dataclass(frozen=True)
class Chosen:
    """Captions in the order in which pictures are numbered."""

    captions: tuple[str, ...]
    file_sha256: str
    """Of the captions file."""
    choice_sha256: str
    """Of the chosen captions, each with a line end."""


def choose_captions(path: Path, count: int, seed: int, column: str = "caption") -> Chosen:
    """Read captions and draw `count` of them without repetition, by `seed` alone.

    Args:
        path: COCO's annotations (.json, at most one caption of each picture, the one with the lowest id), or
            .txt, .jsonl, .csv or .parquet as for training.
        count: how many; all in their order if there are no more.
        seed: of the choice.
        column: key or column of the caption in tables.

    Raises:
        WadiError: the file is unreadable, has no captions, or fewer than `count`.
    """
    with explain_os_errors(path, "read the captions"):
        file_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix.lower() == ".json":
        captions = _coco(path)
    else:
        captions = [prompt.text for prompt in read_prompts(str(path), column)]
    if len(captions) < count:
        raise WadiError(f"{path}: {len(captions)} captions, fewer than --num-samples {count}; ask for fewer")
    if len(captions) > count:
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))[:count]
        captions = [captions[i] for i in order.sort().values.tolist()]
    text = "".join(f"{caption}\n" for caption in captions)
    return Chosen(tuple(captions), file_sha256, hashlib.sha256(text.encode()).hexdigest())


def _coco(path: Path) -> list[str]:
    content = read_json(path)
    try:
        rows = sorted(content["annotations"], key=lambda row: row["id"])
        first: dict[object, str] = {}
        for row in rows:
            first.setdefault(row["image_id"], " ".join(row["caption"].split()))
    except (KeyError, TypeError, AttributeError) as error:
        raise WadiError(
            f"{path}: not COCO's caption annotations (annotations with id, image_id, caption); name another "
            "file, or .txt, .jsonl, .csv"
        ) from error
    return [caption for caption in first.values() if caption]
