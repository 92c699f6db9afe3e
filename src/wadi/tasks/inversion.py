"""What images share, learned as a new word: a subject, or a relation between two objects.

Only the embeddings of the new word are trained, on the multi-step model, whose networks stay as they are. For
a subject this is textual inversion (arXiv 2208.01618). A relation is a word that is used like a preposition
("a panda <R> a rocket"), and is learned by ReVersion (arXiv 2303.13495): a further loss steers the word
towards prepositions and away from the objects of the captions, and timesteps are drawn more often where the
noise is high, because the layout is decided there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from wadi.device import chosen_device
from wadi.diffusion import Schedule
from wadi.diffusion.schedule import prediction_type
from wadi.errors import WadiError
from wadi.files import save_tensors
from wadi.onestep.loading import load_pipeline
from wadi.onestep.student import check_teacher, network_of
from wadi.outputs import Output
from wadi.progress import progress
from wadi.tasks.exemplars import Exemplars, read_exemplars
from wadi.tasks.inversion_config import InvertConfig
from wadi.tasks.inversion_word import Batch, Word, known_words, tokenize_captions

EMBEDDING_FILE = "learned_embeds.safetensors"
"""The name that diffusers' `load_textual_inversion` looks for in a folder."""


@dataclass(frozen=True)
class Inversion:
    """A learned word.

    Attributes:
        token: the word.
        embedding: (n, D) float32, on the CPU.
        kind: "relation" or "subject".
        captions: captions of the exemplars, or templates for a subject without captions.
        losses: denoising loss of every update.
        interrupted: whether Ctrl-C ended the training.
    """

    token: str
    embedding: torch.Tensor
    kind: str
    captions: tuple[str, ...]
    losses: tuple[float, ...]
    interrupted: bool

    def save(self, folder: str | os.PathLike, overwrite: bool = False) -> Path:
        """Write the embedding as diffusers' `load_textual_inversion` reads it.

        Args:
            folder: folder of the file, which is made if it is missing.
            overwrite: replace the file if it exists.

        Returns:
            The file.

        Raises:
            WadiError: the file exists, or cannot be written.
        """
        path = Path(folder) / EMBEDDING_FILE
        output = Output(path, "invert", overwrite=overwrite, suffixes=(path.suffix,))
        with output.writing() as temporary:
            save_tensors(temporary, {self.token: self.embedding}, {"kind": self.kind})
        return path


def invert(config: InvertConfig) -> Inversion:
    """Learn the word that the options describe, without writing anything.

    Raises:
        WadiError: an option is outside its range, exemplars or model cannot be read, the model is not Stable
            Diffusion or has the word already, or captions lack the word or are too long.
    """
    config.check()
    if config.model is None:
        raise WadiError("--model: name the folder or hub id of a multi-step Stable Diffusion model")
    exemplars = read_exemplars(config.examples)
    device = chosen_device(config.device)
    pipeline = load_pipeline(config.model, getattr(torch, config.dtype))
    check_teacher(config.model, pipeline.scheduler, network_of(pipeline))
    return learn_word(pipeline.to(device), exemplars, config)


def learn_word(pipeline: StableDiffusionPipeline, exemplars: Exemplars, config: InvertConfig) -> Inversion:
    """Train the embeddings of a new word; the pipeline itself does not change.

    Args:
        pipeline: a multi-step model on its device.
        exemplars: images and captions.
        config: options, of which `examples`, `out`, `model`, `dtype` and `device` are not used.

    Raises:
        WadiError: as `invert`.
    """
    return learn_words(pipeline, [(exemplars, config)])[0]


def learn_words(
    pipeline: StableDiffusionPipeline, jobs: Sequence[tuple[Exemplars, InvertConfig]]
) -> list[Inversion]:
    """Train several words in one batch; each is, up to rounding, what `learn_word` would learn.

    Larger batches are faster on small models.

    Args:
        pipeline: a multi-step model on its device.
        jobs: exemplars and options of each word, which have different tokens and the same number of updates.

    Raises:
        WadiError: as `invert`, or two words have the same token or another number of updates.
    """
    _check_pipeline(pipeline)
    generators = [torch.Generator().manual_seed(config.seed) for _, config in jobs]
    words = [Word(pipeline, *job, generator) for job, generator in zip(jobs, generators, strict=True)]
    if len({word.token for word in words}) < len(words):
        raise WadiError("learn_words: every word needs a token of its own")
    if len({config.max_train_steps for _, config in jobs}) > 1:
        raise WadiError("learn_words: all words need the same max_train_steps")
    with known_words(pipeline, words):
        for word in words:
            word.ids = tokenize_captions(pipeline, word.captions)
        if checkpointing := jobs[0][1].gradient_checkpointing:
            pipeline.unet.enable_gradient_checkpointing()
        try:
            interrupted = _train(pipeline, words, jobs[0][1].max_train_steps)
        finally:
            if checkpointing:
                pipeline.unet.disable_gradient_checkpointing()
    return [
        Inversion(
            word.token,
            word.rows.detach().cpu(),
            word.kind,
            tuple(word.captions),
            tuple(word.losses),
            interrupted,
        )
        for word in words
    ]


def _check_pipeline(pipeline: Any) -> None:
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise WadiError(
            f"--model: is a {type(pipeline).__name__}; words are learned on a StableDiffusionPipeline"
        )
    if (predicted := prediction_type(pipeline.scheduler)) not in ("epsilon", "v_prediction"):
        raise WadiError(f"--model: predicts {predicted!r}; name one that predicts epsilon or v_prediction")
    if not isinstance(pipeline.unet.config.sample_size, int):
        raise WadiError("--model: its images are not square, and a word can be learned only on square images")


@contextmanager
def _frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """Within the block no parameter of the modules needs a gradient."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _train(pipeline: StableDiffusionPipeline, words: Sequence[Word], steps: int) -> bool:
    """Update the embeddings of the words; returns whether Ctrl-C ended the training."""
    schedule = Schedule.from_config(pipeline.scheduler).to(pipeline.unet.device)
    groups = [{"params": [word.rows], "lr": word.learning_rate} for word in words]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = progress(range(steps), desc="new word", unit="step")
    try:
        with _frozen(pipeline.unet, pipeline.vae, pipeline.text_encoder):
            for step in bar:
                batches = [word.draw() for word in words]
                denoising = denoising_losses(pipeline, schedule, words, batches)
                total = sum(
                    word.loss(loss, batch)
                    for word, loss, batch in zip(words, denoising, batches, strict=True)
                )
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                decay.step()
                for word, loss in zip(words, denoising.tolist(), strict=True):
                    if not math.isfinite(loss):
                        raise WadiError(f"step {step}: the loss is {loss}; lower --learning-rate")
                    word.losses.append(loss)
                recent = words[0].losses[-50:]
                bar.set_postfix_str(f"loss {sum(recent) / len(recent):.4f}")
    except KeyboardInterrupt:
        return True
    return False


def denoising_losses(
    pipeline: StableDiffusionPipeline,
    schedule: Schedule,
    words: Sequence[Word],
    batches: Sequence[Batch],
) -> torch.Tensor:
    """Mean squared errors (K,) of the predictions for the batch of each word, in one forward pass."""
    device = pipeline.unet.device
    latents, noise, t = (
        torch.cat([getattr(batch, name) for batch in batches]).to(device)
        for name in ("latents", "noise", "timesteps")
    )
    ids = torch.cat([word.ids[batch.chosen] for word, batch in zip(words, batches, strict=True)]).to(device)
    states = pipeline.text_encoder(ids)[0]
    noisy = schedule.add_noise(latents, noise, t)
    prediction = pipeline.unet(noisy.to(states.dtype), t, states, return_dict=False)[0]
    target = schedule.target(latents, noise, t)
    error = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
    return torch.stack([part.mean() for part in error.cpu().split([len(batch.latents) for batch in batches])])
