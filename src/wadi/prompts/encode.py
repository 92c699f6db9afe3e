"""What a training takes of its prompts: encoded once before it, or while it runs (`window.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from wadi.backbones import PromptEncoder
from wadi.backbones.condition import Condition, concatenate, pick
from wadi.prompts.cache import EmbeddingCache, Embeddings
from wadi.prompts.window import Window


class Conditions(Protocol):
    """Where a training gets the conditions of its prompts: `Embeddings`, or a `Window`."""

    def __len__(self) -> int:
        """Number of the prompts."""

    def take(self, indices: torch.Tensor, pin_memory: bool = False, step: int = 0) -> Condition:
        """Conditions of the prompts (N,) that a step draws, in that order, on the CPU."""

    def waits(self, step: int) -> bool:
        """Whether `take` may wait or fail at this step."""

    def close(self) -> None:
        """End what works in the background."""


@dataclass(frozen=True)
class PromptEmbeddings:
    """Encoded prompts on the CPU, embeddings in the compute dtype.

    Attributes:
        embeddings: the N training prompts, or what encodes them while the training runs.
        null: what the pipeline uses where there is no prompt, first dimension 1.
        validation: the V prompts of the sample grids; empty where V is 0.
    """

    embeddings: Conditions
    null: Condition
    validation: Condition


def encode_prompts(
    encoder: PromptEncoder,
    prompts: list[str],
    validation: list[str],
    cache: EmbeddingCache | None = None,
    window: Window | None = None,
) -> PromptEmbeddings:
    """Encode what the training needs at its start; the text encoder is then gone from the device.

    Args:
        encoder: of the teacher.
        prompts: for training; none, if there is a window.
        validation: of the sample grids.
        cache: takes from the disk what is there, and puts there what is not; without it, all is in memory.
        window: encodes the prompts for training later.
    """
    where = {text: i for i, text in enumerate(prompts)}
    others = [text for text in validation if text not in where]
    if cache is not None:
        sets = cache.encode(*(some for some in ([encoder.no_prompt], others, prompts) if some))
        empty, embeddings = sets[0].take(torch.tensor([0])), sets[-1]
        more = [sets[1].take(torch.tensor([i])) for i in range(len(others))]
    else:
        encoded = encoder.encode([encoder.no_prompt, *others, *prompts])
        empty = pick(encoded, slice(1))
        more = [pick(encoded, slice(i, i + 1)) for i in range(1, len(others) + 1)]
        embeddings = Embeddings([pick(encoded, slice(1 + len(others), None))])
    of_others = dict(zip(others, more, strict=True))
    grid = [of_others.get(text) or embeddings.take(torch.tensor([where[text]])) for text in validation]
    source = embeddings if window is None else window
    return PromptEmbeddings(source, encoder.null(empty), concatenate(grid) if grid else {})
