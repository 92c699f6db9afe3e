"""Training prompts from a file or a data set."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from wadi.errors import WadiError
from wadi.tables import SUFFIXES, Prompt, check_column, read_texts, with_text

AT_ONCE = 10_000
"""Prompts that are tokenized at once. The tokens of a million would take gigabytes."""


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
    what: str = "prompts",
) -> None:
    """Check that the tokenizer takes every prompt whole, unless `truncate` says that it need not.

    Args:
        prompts: what to check.
        tokenizer: of the model.
        source: what the prompts are from, for the message.
        truncate: whether longer prompts are cut.
        limit: most tokens of a prompt; the tokenizer's own when ``None``.
        what: what the message calls the prompts.

    Raises:
        WadiError: with the number of prompts that are too long and the line of the first.
    """
    if truncate:
        return
    limit = tokenizer.model_max_length if limit is None else limit
    long = []
    for start in range(0, len(prompts), AT_ONCE):
        some = prompts[start : start + AT_ONCE]
        ids = tokenizer([p.text for p in some], verbose=False, return_attention_mask=False).input_ids
        long += [(prompt, len(own)) for prompt, own in zip(some, ids, strict=True) if len(own) > limit]
    if long:
        prompt, n = long[0]
        raise WadiError(
            f"{source}: {len(long)} of {len(prompts)} {what} are longer than the {limit} tokens that the "
            f"tokenizer takes; the first is on line {prompt.line} ({n} tokens); shorten them or pass "
            "--truncate-prompts"
        )


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
