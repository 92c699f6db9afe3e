"""Training prompts: read from a file or a data set, and encoded once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from wadi.backbones import PromptEncoder, load_prompt_encoder
from wadi.backbones.condition import Condition, concatenate, pick
from wadi.distill.cache import EmbeddingCache, Embeddings, cache_output
from wadi.distill.config import DTYPES
from wadi.errors import WadiError
from wadi.tables import SUFFIXES, Prompt, check_column, read_texts, with_text


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


def read_prompts(source: str, column: str = "text", split: str = "train") -> list[Prompt]:
    """Read prompts; blank ones are skipped, and of identical ones the first is kept.

    Args:
        source: a file of `wadi.tables.SUFFIXES`, read as `read_texts` says, or a `datasets` id or folder.
        column: key or column of the prompt, except in .txt and COCO's annotations.
        split: split of a `datasets` id.

    Raises:
        WadiError: unreadable or empty file, missing column, unknown kind of file, or no `datasets`.
    """
    path = Path(source)
    if path.suffix.lower() in SUFFIXES:
        prompts = read_texts(path, column)
    elif path.is_file():
        raise WadiError(f"{source}: unknown kind of prompt file; use one of {', '.join(SUFFIXES)}")
    else:
        prompts = _read_dataset(source, column, split)
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(prompt.text, prompt)
    if not unique:
        raise WadiError(f"{source}: holds no prompts")
    return list(unique.values())


def check_length(
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    truncate: bool = False,
    limit: int | None = None,
) -> None:
    """Check that the tokenizer takes every prompt whole, unless `truncate` says that it need not.

    Args:
        prompts: what to check.
        tokenizer: of the model.
        source: what the prompts are from, for the message.
        truncate: whether longer prompts are cut.
        limit: most tokens of a prompt; the tokenizer's own when ``None``.

    Raises:
        WadiError: with the number of prompts that are too long and the line of the first.
    """
    if truncate:
        return
    limit = tokenizer.model_max_length if limit is None else limit
    lengths = [len(ids) for ids in tokenizer([p.text for p in prompts], verbose=False).input_ids]
    long = [(prompt, n) for prompt, n in zip(prompts, lengths, strict=True) if n > limit]
    if long:
        prompt, n = long[0]
        raise WadiError(
            f"{source}: {len(long)} of {len(prompts)} prompts are longer than the {limit} tokens that the "
            f"tokenizer takes; the first is on line {prompt.line} ({n} tokens); shorten them or pass "
            "--truncate-prompts"
        )


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


@dataclass
class EncodePromptsConfig:
    """Encode prompts once and keep them on the disk, where `wadi distill` finds them."""

    teacher: str
    """Pipeline folder or hub id whose text encoder is used."""

    prompts: str
    """A .txt file (one a line), a .jsonl, .csv, .tsv, .json or .parquet file, or a `datasets` id."""

    embeddings_dir: str | None = None
    """Where to keep them; without it, $WADI_CACHE/prompts or ~/.cache/wadi/prompts."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    """That of the distillation: decides the dtype of the embeddings."""

    validation_prompts: tuple[str, ...] = ()
    """Prompts of the sample grids, if they are not among the others."""

    caption_column: str = "text"
    """Column (or key) of the prompts in .jsonl, .csv, .parquet files and data sets."""

    dataset_split: str = "train"
    """Split to read when the prompts are a `datasets` id."""

    truncate_prompts: bool = False
    """Cut prompts that are longer than the model takes, instead of stopping."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the text encoder works."""


def encode_to_disk(config: EncodePromptsConfig) -> dict[str, Any]:
    """Do `wadi prompts encode`; an interrupted encoding goes on where it stopped.

    Returns:
        Number of prompts, how many of them were encoded now, and the cache's folder.

    Raises:
        WadiError: bad prompts, no such teacher, or a file that cannot be written.
    """
    if config.embeddings_dir is not None:
        cache_output(config.embeddings_dir, config.teacher, config.prompts).check()
    prompts = read_prompts(config.prompts, config.caption_column, config.dataset_split)
    encoder = load_prompt_encoder(config.teacher, DTYPES[config.mixed_precision], config.device)
    check_length(prompts, encoder.tokenizer, config.prompts, config.truncate_prompts, encoder.limit)
    cache = EmbeddingCache(encoder, config.embeddings_dir)
    texts = [prompt.text for prompt in prompts]
    before = len(cache.missing(texts))
    encode_prompts(encoder, texts, list(config.validation_prompts), cache)
    return {"prompts": len(texts), "shards_encoded_now": before, "folder": str(cache.entry(texts))}


def _read_dataset(name: str, column: str, split: str) -> list[Prompt]:
    missing = "is a folder" if Path(name).is_dir() else "no such file"
    try:
        import datasets
    except ImportError as error:
        raise WadiError(
            f"{name}: {missing}, and reading a data set needs `datasets`; pip install datasets"
        ) from error
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # every kind of failure of the hub and of a data set's files
        raise WadiError(
            f"{name}: {missing}, and not loaded as a data set: {' '.join(str(error).split())}"
        ) from error
    check_column(column, data.column_names, name)
    return with_text(enumerate(data[column], 1), name, column)
