"""`wadi prompts encode`: encode training prompts once, and keep them on the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from wadi.backbones import load_prompt_encoder
from wadi.commands.teacher_file import TeacherFile
from wadi.device import DTYPES, chosen_device
from wadi.distill.config import ModelOptions
from wadi.errors import tell
from wadi.prompts import EmbeddingCache, Prompt, check_length, encode_prompts, read_prompts
from wadi.prompts.cache import cache_output


@dataclass
class PromptsEncodeConfig:
    """Encode prompts once and keep them on the disk, where `wadi distill` finds them."""

    teacher: str
    """Pipeline folder, hub id or single file whose text encoders are used."""

    prompts: str
    """A .txt file (one a line), a .jsonl, .csv, .tsv, .json or .parquet file, or a `datasets` id."""

    teacher_file: TeacherFile = field(default_factory=TeacherFile)

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

    device: str | None = None
    """Device, such as cpu or cuda:1. If omitted, a GPU if there is one."""


def prompts_encode(config: PromptsEncodeConfig) -> dict[str, Any]:
    """Encode the prompts of a file; an interrupted encoding goes on where it stopped.

    Returns:
        Number of prompts, how many of them were encoded now, and the cache's folder.

    Raises:
        WadiError: bad prompts, no such teacher, or a file that cannot be written.
    """
    if config.embeddings_dir is not None:
        inputs = (config.teacher, *config.teacher_file.inputs, config.prompts)
        cache_output(config.embeddings_dir, *inputs).check()
    prompts = read_prompts(config.prompts, config.caption_column, config.dataset_split)
    teacher = config.teacher_file.folder(config.teacher)
    encoder = load_prompt_encoder(teacher, DTYPES[config.mixed_precision], chosen_device(config.device))
    grid = [Prompt(text, line) for line, text in enumerate(config.validation_prompts, 1)]
    for some, source in ((prompts, config.prompts), (grid, "--validation-prompts")):
        check_length(some, encoder.tokenizer, source, config.truncate_prompts, encoder.limit)
    cache = EmbeddingCache(encoder, config.embeddings_dir)
    texts = [prompt.text for prompt in prompts]
    before = len(cache.missing(texts))
    embeddings = encode_prompts(encoder, texts, list(config.validation_prompts), cache).embeddings
    needed, limit = len(texts) * embeddings.bytes_a_prompt / 2**30, ModelOptions().embeddings_limit
    if needed > limit:
        tell(
            f"wadi distill uses them only with --embeddings-limit {math.ceil(1000 * needed) / 1000:g} or "
            "more; with a lower limit it encodes prompts again, during the training"
        )
    return {"prompts": len(texts), "shards_encoded_now": before, "folder": str(cache.entry(texts))}
