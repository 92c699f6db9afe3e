"""Training on a set of millions of prompts: how soon it starts, and what encoding beside it costs.

    python benchmarks/prompt_sets.py                                # Stable Diffusion 1.5, on a GPU
    python benchmarks/prompt_sets.py --model tiny --updates 20      # does it run?

A pipeline with random weights and a text file of short prompts are made first, which is not timed. The start
is everything from reading the prompts to the first ones that are encoded: hashes, checks of length, loading
the pipeline, the trainer. Then the same updates are timed with prompts that are encoded beside them, and with
256 prompts that were encoded before. The difference is what the training loses.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from wadi.backbones import load_backbone
from wadi.distill import DistillConfig, Trainer, make_accelerator
from wadi.distill.prompts import prepare_prompts
from wadi.identity import model_digest, texts_digest
from wadi.prompts import Window, read_prompts

sys.path.insert(0, str(Path(__file__).parent))
import adapters
import sampling

WORDS = ("red", "blue", "green", "cat", "dog", "bird", "house", "car", "boat", "hill", "tree", "river", "old")
WARM_UP = 3
"""Updates that are not timed."""


@dataclass
class Options:
    """Time the start and the updates of a training on a large set of prompts."""

    model: Literal["sd15", "tiny"] = "sd15"
    """Configuration of the pipeline; its weights are random."""
    count: int = 1_400_000
    """Prompts of the set."""
    updates: int = 200
    """Timed updates."""
    max_train_steps: int = 20_000
    """Updates of the whole run: the prompts that it draws are checked before it starts."""
    batch_size: int = 4
    """Prompts an update."""
    text_encoder_device: Literal["auto", "gpu", "cpu"] = "auto"
    """Where the text encoder works."""
    out: Path | None = None
    """JSON file for the figures."""


def write_prompts(path: Path, count: int) -> None:
    """Short prompts of 12 words and a number, one a line."""
    chosen = random.Random(0)
    lines = (" ".join([*chosen.choices(WORDS, k=12), str(number)]) for number in range(count))
    path.write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def started(options: Options, folder: Path, prompts: Path, limit: float) -> Iterator[tuple[Trainer, float]]:
    """A trainer whose first prompts are encoded, and the seconds that this took."""
    config = DistillConfig.of(
        pretrained_model_name_or_path=str(folder / "teacher"),
        prompts=str(prompts),
        output_dir=str(folder / "run"),
        embeddings_dir=str(folder / "embeddings"),
        embeddings_limit=limit,
        text_encoder_device=options.text_encoder_device,
        student_rank=adapters.RANKS[options.model],
        fake_rank=adapters.RANKS[options.model],
        train_batch_size=options.batch_size,
        max_train_steps=options.max_train_steps,
        validation_steps=0,
        mixed_precision="bf16",
        gradient_checkpointing=True,
    )
    accelerator = make_accelerator(config)
    start = time.perf_counter()
    read = read_prompts(config.model.prompts)
    model_digest(folder / "teacher")
    texts_digest(prompt.text for prompt in read)
    backbone = load_backbone(str(folder / "teacher"), config.run.dtype, accelerator.device)
    encoded = prepare_prompts(config, backbone.text, read, accelerator)
    with contextlib.closing(encoded.embeddings):
        trainer = Trainer(config, backbone, encoded, accelerator)
        trainer.draw(0)
        yield trainer, time.perf_counter() - start


def milliseconds(trainer: Trainer, updates: int) -> float:
    """Time of an update, the mean over many."""
    for step in range(WARM_UP):
        trainer.step(step)
    trainer.synchronize()
    start = time.perf_counter()
    for step in range(WARM_UP, WARM_UP + updates):
        trainer.step(step)
    trainer.synchronize()
    return 1000 * (time.perf_counter() - start) / updates


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """The figures of the table."""
    sampling.build(options.model, "cpu", torch.float32)[0].save_pretrained(folder / "teacher")
    large, small = folder / "large.txt", folder / "small.txt"
    write_prompts(large, options.count)
    write_prompts(small, 256)
    with started(options, folder, large, 0.5 if options.model == "sd15" else 0.01) as (trainer, seconds):
        window = trainer.prompts.embeddings
        if not isinstance(window, Window):
            raise SystemExit("--count: all prompts fit in the memory; give more")
        beside = milliseconds(trainer, options.updates)
        share = window.waited / (beside * options.updates / 1000)
        rate = window.encoded / window.worked
    del trainer
    with started(options, folder, small, 10.0) as (trainer, _):
        before = milliseconds(trainer, options.updates)
    return {
        "prompts": options.count,
        "seconds_to_start": seconds,
        "milliseconds_encoded_beside": beside,
        "milliseconds_encoded_before": before,
        "share_waited": share,
        "prompts_encoded_a_second": rate,
    }


def main(options: Options) -> None:
    """Measure, and print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = adapters.header(adapters.Options(model=options.model, device=device))
    print(head, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, Path(folder))
    print(
        "| prompts | start, s | ms an update, encoded beside | encoded before | waited "
        "| prompts encoded a second |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    print(
        f"| {row['prompts']} | {row['seconds_to_start']:.0f} | {row['milliseconds_encoded_beside']:.1f} "
        f"| {row['milliseconds_encoded_before']:.1f} | {row['share_waited']:.1%} "
        f"| {row['prompts_encoded_a_second']:.0f} |"
    )
    if options.out is not None:
        options.out.write_text(json.dumps({"header": head, "options": str(options), "row": row}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Options))
