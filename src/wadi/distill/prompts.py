"""The prompts of a run: checked, and encoded before the training or, where all are too many, during it."""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator

from wadi.backbones import PromptEncoder
from wadi.distill.config import DistillConfig
from wadi.distill.draws import Draws
from wadi.errors import WadiError
from wadi.prompts import EmbeddingCache, Prompt, PromptEmbeddings, Window, check_length, encode_prompts


def prepare_prompts(
    config: DistillConfig, text: PromptEncoder, prompts: list[Prompt], accelerator: Accelerator
) -> PromptEmbeddings:
    """Check the length of the prompts that the run draws, and encode what must be ready when it begins.

    Whether the training prompts are encoded now or during the training depends on their number and on
    `embeddings_limit`, so a resumed run does the same again.

    Args:
        config: the options.
        text: the teacher's text encoders.
        prompts: for training.
        accelerator: of this process.

    Returns:
        The encoded prompts; the caller must close their `embeddings`.

    Raises:
        WadiError: a prompt is too long, the limit is too low, or the prompts cannot be encoded.
    """
    model, validation = config.model, list(config.run.validation_prompts)
    if model.text_encoder_device == "cpu":
        text.device = torch.device("cpu")
    elif model.text_encoder_device == "gpu" and accelerator.device.type == "cpu":
        raise WadiError("--text-encoder-device gpu: the training runs on the CPU; omit the option")
    cache = EmbeddingCache(text, model.embeddings_dir)
    with contextlib.ExitStack() as stack:
        if cache.missing([text.no_prompt]):
            stack.enter_context(text.loaded())
        size = cache.encode([text.no_prompt])[0].bytes_a_prompt
        window = None
        if size * len(prompts) > model.embeddings_limit * 2**30:
            window = _window(config, text, prompts, accelerator, size)
        else:
            check_length(prompts, text.tokenizer, model.prompts, model.truncate_prompts, text.limit)
        grid = [Prompt(prompt, line) for line, prompt in enumerate(validation, 1)]
        check_length(grid, text.tokenizer, "--validation-prompts", model.truncate_prompts, text.limit)
        now = [] if window is not None else [prompt.text for prompt in prompts]
        return encode_prompts(text, now, validation, cache, window)


def tell_time(prompts: PromptEmbeddings, accelerator: Accelerator) -> None:
    """Print how long the training has waited for prompts, if they were encoded during it."""
    if isinstance(prompts.embeddings, Window):
        accelerator.print(prompts.embeddings.told())


def _window(
    config: DistillConfig, text: PromptEncoder, prompts: list[Prompt], accelerator: Accelerator, size: int
) -> Window:
    model, optimizer = config.model, config.optimizer
    n, count = optimizer.train_batch_size * optimizer.gradient_accumulation_steps, len(prompts)
    shared = accelerator.process_index, accelerator.num_processes

    def drawn(step: int) -> torch.Tensor:
        return Draws(config.run.seed, step, torch.device("cpu"), *shared).prompts(n, count)

    limit, place = model.embeddings_limit * 2**30, model.text_encoder_device
    window = Window(text, [prompt.text for prompt in prompts], drawn, n, limit, size, place)
    accelerator.print(
        f"prompts: all {count} would take {size * count / 2**30:.3g} GiB encoded, which is more than "
        f"--embeddings-limit {model.embeddings_limit:g}; they are encoded during the training"
    )
    if not model.truncate_prompts:
        own = [prompts[number] for number in window.numbers(config.run.max_train_steps)]
        check_length(own, text.tokenizer, model.prompts, limit=text.limit, what="prompts that the run draws")
    return window
