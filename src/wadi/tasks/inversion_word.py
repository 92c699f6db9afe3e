"""A word that is learned from exemplars: what it is, its captions, its batches, and its losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from wadi.errors import WadiError
from wadi.onestep.arguments import own_size
from wadi.tasks.exemplars import Exemplars, cropped
from wadi.tasks.inversion_config import (
    INITIALIZERS,
    LEARNING_RATES,
    PREPOSITIONS,
    TEMPLATES,
    TOKENS,
    UNIMPORTANT,
    InvertConfig,
)


def steering_loss(
    relation: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, temperature: float = 0.07
) -> torch.Tensor:
    r"""Relation-steering contrastive loss of ReVersion (arXiv 2303.13495): InfoNCE with several positives.

        - log( p / (p + n) ),  p = sum_l exp(cos(R, P_l) / gamma),  n = sum_m exp(cos(R, N_m) / gamma)

    Args:
        relation: R, (n, D) float, embeddings of the new word.
        positives: P, (L, D), embeddings of prepositions.
        negatives: N, (M, D), embeddings of the other words of the captions.
        temperature: gamma.

    Returns:
        The mean over the n embeddings, 0-dimensional.
    """
    unit = F.normalize(relation, dim=1)
    attracted = unit @ F.normalize(positives, dim=1).T / temperature
    repelled = unit @ F.normalize(negatives, dim=1).T / temperature
    return (torch.cat([attracted, repelled], 1).logsumexp(1) - attracted.logsumexp(1)).mean()


def focal_density(num_timesteps: int, alpha: float, lowest: int = 0) -> torch.Tensor:
    r"""Relation-focal importance sampling of ReVersion (arXiv 2303.13495): how often each timestep is drawn.

        f(t) = (1 - alpha cos(pi t / T)) / T

    It is taken at t + 1/2, so that its sum is exactly one: the sum of f up to t is
    (t + 1) / T - alpha sin(pi (t + 1) / T) / (2 T sin(pi / (2 T))).

    Args:
        num_timesteps: T.
        alpha: with 0 all timesteps are equally likely; with 1 the first is never drawn.
        lowest: timesteps below are never drawn; the others keep their proportions.

    Returns:
        (T,) float64, whose sum is one.
    """
    t = torch.arange(num_timesteps, dtype=torch.float64) + 0.5
    density = (1 - alpha * torch.cos(math.pi * t / num_timesteps)) / num_timesteps
    if lowest:
        density[:lowest] = 0
        density /= density.sum()
    return density


def kind_and_token(config: InvertConfig, exemplars: Exemplars) -> tuple[str, str]:
    """What is learned, "relation" or "subject", and the new word.

    Raises:
        WadiError: the word cannot be used, or the captions are missing or lack it.
    """
    kind, captions = config.kind, exemplars.captions
    if kind == "auto":
        relation = captions is not None and _stands_between(captions[0], config.token or TOKENS["relation"])
        kind = "relation" if relation else "subject"
    token = config.token or TOKENS[kind]
    if token != token.strip() or not token or " " in token:
        raise WadiError(f"--token {token!r}: must be one word, such as {TOKENS[kind]}")
    if config.num_vectors > 1 and token != token.lower():
        raise WadiError(
            f"--token {token}: a word of several vectors must be in lower case, as {token.lower()}, because "
            "diffusers finds no other words in a prompt"
        )
    if kind == "relation" and captions is None:
        raise WadiError(
            f'{config.examples}: a relation needs captions, such as "a panda {token} a rocket"; write them '
            "into a metadata.jsonl in this folder"
        )
    for path, caption in zip(exemplars.paths, captions or (), strict=False):
        if token not in caption.split():
            raise WadiError(
                f"{path}: {token} is not in its caption {caption!r}; put it there, or name --token"
            )
    return kind, token


def _stands_between(caption: str, token: str) -> bool:
    """Whether the token stands between two objects: "a panda <R> a rocket", not "a photo of a <R> at sea"."""
    before, found, after = caption.lower().partition(f" {token.lower()} ")
    return bool(found and after) and before.split()[-1] not in (*UNIMPORTANT, *PREPOSITIONS)


def captions_of(pipeline: StableDiffusionPipeline, exemplars: Exemplars, token: str) -> list[str]:
    """The captions of exemplars; for a subject without captions, templates that the tokenizer knows."""
    if exemplars.captions is not None:
        return list(exemplars.captions)
    known = [
        template
        for template in TEMPLATES
        if all(one_token(pipeline, word) is not None for word in template.replace("{}", "").split())
    ]
    return [template.format(token) for template in known or TEMPLATES]


def one_token(pipeline: StableDiffusionPipeline, word: str) -> int | None:
    """The token of a word, or None if the model's tokenizer splits it."""
    ids = pipeline.tokenizer(word, add_special_tokens=False).input_ids
    return ids[0] if len(ids) == 1 else None


def word_embedding(pipeline: StableDiffusionPipeline, word: str, option: str) -> torch.Tensor:
    """The embedding (D,) float32 of a word that is one token, on the CPU.

    Raises:
        WadiError: it is not one token; the message names the option.
    """
    index = one_token(pipeline, word)
    if index is None:
        raise WadiError(f"{option} {word}: is not one token of this model; name another word")
    return pipeline.text_encoder.get_input_embeddings().weight[index].detach().float().cpu()


def tokenize_captions(pipeline: StableDiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """Tokens (N, L) int64 of captions on the CPU, as in the pipeline's `encode_prompt`.

    Raises:
        WadiError: a caption is too long.
    """
    tokenizer, limit = pipeline.tokenizer, pipeline.tokenizer.model_max_length
    whole = pipeline.maybe_convert_prompt(list(captions), tokenizer)
    for caption, ids in zip(
        captions, tokenizer(whole, truncation=False, verbose=False).input_ids, strict=True
    ):
        if len(ids) > limit:
            raise WadiError(
                f"caption {caption!r}: {len(ids)} tokens, but the model takes {limit}; shorten it"
            )
    return tokenizer(whole, padding="max_length", max_length=limit, return_tensors="pt").input_ids


@torch.no_grad()
def encode_exemplars(
    pipeline: StableDiffusionPipeline, exemplars: Exemplars
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of the images' latents, (N, C, h, w) float32 each, scaled, on the CPU."""
    vae, size, found = pipeline.vae, own_size(pipeline), []
    for image in exemplars.images:
        pixels = pipeline.image_processor.preprocess(cropped(image, *size)).to(vae.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist
        found.append(torch.stack([latents.mean, latents.std]).float().cpu())
    return tuple(torch.cat(found, 1) * vae.config.scaling_factor)


class Steering:
    """The positives and negatives of `steering_loss`.

    Args:
        pipeline: holds tokenizer and embeddings.
        captions: the words of each caption are its negatives.
        token: the new word.
        config: names the prepositions, which are the positives.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, captions: Sequence[str], token: str, config: InvertConfig
    ) -> None:
        words = config.prepositions or [w for w in PREPOSITIONS if one_token(pipeline, w) is not None]
        if not words:
            raise WadiError(
                "--prepositions: this model has no English preposition as one token; name words of its own, "
                "or give --steering-weight 0"
            )
        self.positives = torch.stack([word_embedding(pipeline, word, "--prepositions") for word in words])
        omitted = {*UNIMPORTANT, *PREPOSITIONS, *config.prepositions, token.lower()}
        table = pipeline.text_encoder.get_input_embeddings().weight.detach()
        self.negatives = []
        for caption in captions:
            words = " ".join(word for word in caption.lower().split() if word not in omitted)
            ids = sorted(set(pipeline.tokenizer(words, add_special_tokens=False).input_ids))
            self.negatives.append(table[ids].float().cpu())
        self.count, self.temperature = config.num_positives, config.steering_temperature

    def __call__(
        self, rows: torch.Tensor, captions: Sequence[int], generator: torch.Generator
    ) -> torch.Tensor:
        """The loss of `rows` (n, D); the negatives are the words of the captions with these numbers."""
        chosen = torch.randperm(len(self.positives), generator=generator)[: self.count]
        negatives = torch.cat([self.negatives[i] for i in captions])
        return steering_loss(rows, self.positives[chosen], negatives, self.temperature)


class Batch(NamedTuple):
    """What one update of one word uses, on the CPU."""

    latents: torch.Tensor
    """(B, C, h, w) float32"""
    noise: torch.Tensor
    """(B, C, h, w) float32"""
    timesteps: torch.Tensor
    """(B,) int64"""
    chosen: list[int]
    """Numbers of the captions."""


class Word:
    """A word that is learned: its embeddings, its exemplars, and the batches that are drawn from them.

    All of it is small and on the CPU. For each update, a batch and the embeddings are sent to the device.

    Attributes:
        kind: "relation" or "subject".
        token: the new word.
        captions: captions of the exemplars, or templates.
        ids: tokens of the captions, which are set when the pipeline knows the word.
        rows: embeddings (n, D) float32, which are trained.
        losses: denoising loss of every update so far.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        exemplars: Exemplars,
        config: InvertConfig,
        generator: torch.Generator,
    ) -> None:
        self.config, self.generator, self.losses = config, generator, []
        self.kind, self.token = kind_and_token(config, exemplars)
        self.captions, self.own = captions_of(pipeline, exemplars, self.token), exemplars.captions is not None
        relation = self.kind == "relation"
        count = pipeline.scheduler.config.num_train_timesteps
        if config.lowest_timestep >= count:
            raise WadiError(f"--lowest-timestep {config.lowest_timestep}: the model has {count} timesteps")
        focal = (config.focal_alpha, config.lowest_timestep) if relation else (0.0, 0)
        self.density = focal_density(count, *focal)
        self.steer = None
        if relation and config.steering_weight:
            self.steer = Steering(pipeline, self.captions, self.token, config)
        initial = word_embedding(
            pipeline, config.initializer_token or INITIALIZERS[self.kind], "--initializer-token"
        )
        self.ids = torch.zeros(0)
        self.rows = torch.nn.Parameter(initial.repeat(config.num_vectors, 1))
        scale = initial.square().mean().sqrt().item()
        self.learning_rate = scale * (config.learning_rate or LEARNING_RATES[self.kind])
        self.means, self.deviations = encode_exemplars(pipeline, exemplars)

    def draw(self) -> Batch:
        """Draw a batch on the CPU, so that it is the same on every device."""
        size, count = self.config.train_batch_size, len(self.means)
        images = torch.randint(count, (size,), generator=self.generator)
        chosen = images  # each image has its own caption, but templates are for any image
        if not self.own:
            chosen = torch.randint(len(self.captions), (size,), generator=self.generator)
        shape = (size, *self.means.shape[1:])
        variation = torch.randn(shape, generator=self.generator)
        noise = torch.randn(shape, generator=self.generator)
        timesteps = torch.multinomial(self.density, size, replacement=True, generator=self.generator)
        latents = self.means[images] + self.deviations[images] * variation
        return Batch(latents, noise, timesteps, chosen.tolist())

    def loss(self, denoising: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The denoising loss, and for a relation the weighted steering loss with it."""
        if self.steer is None:
            return denoising
        steering = self.steer(self.rows, batch.chosen, self.generator)
        return denoising + self.config.steering_weight * steering


@contextmanager
def known_words(pipeline: StableDiffusionPipeline, words: Sequence[Word]) -> Iterator[None]:
    """Within the block the pipeline knows the words, whose embeddings are the parameters `word.rows`.

    The old tokenizer is put back afterwards, because `unload_textual_inversion` would renumber other words
    where the special tokens are not the last ones of the vocabulary, as in the emoji world.
    """
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    table = text_encoder.get_input_embeddings()
    size = len(table.weight)
    pipeline.tokenizer = copy.deepcopy(tokenizer)
    handle = None
    try:
        for word in words:
            try:
                pipeline.load_textual_inversion({word.token: word.rows.detach().cpu()})
            except ValueError as error:
                raise WadiError(
                    f"--token {word.token}: the model has this word already; name another"
                ) from error
        handle = text_encoder.get_input_embeddings().register_forward_hook(_replacing(pipeline, words))
        yield
    finally:
        if handle is not None:
            handle.remove()
        pipeline.tokenizer = tokenizer
        text_encoder.resize_token_embeddings(size)


def _replacing(pipeline: StableDiffusionPipeline, words: Sequence[Word]) -> Callable:
    """A hook for the table of embeddings, which replaces the rows of the words by `word.rows`."""
    # `load_textual_inversion` numbers the words one after the other, from the end of the vocabulary on
    first = pipeline.tokenizer.convert_tokens_to_ids(words[0].token)

    def replace_rows(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor):
        ids, rows = inputs[0], torch.cat([word.rows for word in words]).to(output)
        return torch.where((ids >= first)[..., None], rows[(ids - first).clamp(min=0)], output)

    return replace_rows
