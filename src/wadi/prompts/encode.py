"""Prompts encoded once, before the training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wadi.backbones import PromptEncoder
from wadi.backbones.condition import Condition, concatenate, pick
from wadi.prompts.cache import EmbeddingCache, Embeddings


@dataclass(frozen=True)
class PromptEmbeddings:
    """Encoded prompts on the CPU, embeddings in the compute dtype.

    Attributes:
        embeddings: the N training prompts.
        null: what the pipeline uses where there is no prompt, first dimension 1.
        validation: the V prompts of the sample grids; empty where V is 0.
    """

    embeddings: Embeddings
    null: Condition
    validation: Condition


def encode_prompts(
    encoder: PromptEncoder,
    prompts: list[str],
    validation: list[str],
    cache: EmbeddingCache | None = None,
) -> PromptEmbeddings:
    """Encode everything that the training will need; the text encoder is then gone from the device.

    Args:
        encoder: of the teacher.
        prompts: for training.
        validation: of the sample grids.
        cache: takes from the disk what is there, and puts there what is not; without it, all is in memory.
    """
    where = {text: i for i, text in enumerate(prompts)}
    others = [text for text in validation if text not in where]
    if cache is not None:
        sets = cache.encode(prompts, [encoder.no_prompt], *([others] if others else []))
        embeddings, empty = sets[0], sets[1].take(torch.tensor([0]))
        more = [sets[2].take(torch.tensor([i])) for i in range(len(others))]
    else:
        encoded = encoder.encode([encoder.no_prompt, *others, *prompts])
        empty = pick(encoded, slice(1))
        more = [pick(encoded, slice(i, i + 1)) for i in range(1, len(others) + 1)]
        embeddings = Embeddings([pick(encoded, slice(1 + len(others), None))])
    of_others = dict(zip(others, more, strict=True))
    grid = [of_others.get(text) or embeddings.take(torch.tensor([where[text]])) for text in validation]
    return PromptEmbeddings(embeddings, encoder.null(empty), concatenate(grid) if grid else {})
