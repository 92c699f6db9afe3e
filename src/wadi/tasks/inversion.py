r"""What images share, learned as a new word: a subject or a relation between two objects.

Only the embeddings of the new word train, on the multi-step model, whose networks stay as they are. For a
subject this is textual inversion (arXiv 2208.01618). For a relation, a word that is used like a preposition
("a panda <R> a rocket"), it is ReVersion (arXiv 2303.13495): the denoising loss, plus a loss that steers the
word towards prepositions and away from the objects of the captions, with timesteps drawn more often where
noise is high and it is decided what is where.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from wadi.device import chosen_device
from wadi.diffusion import Schedule
from wadi.errors import WadiError
from wadi.files import save_tensors
from wadi.onestep.arguments import check_seed, own_size
from wadi.onestep.loading import load_pipeline
from wadi.onestep.student import check_teacher, network_of
from wadi.outputs import Output
from wadi.progress import progress
from wadi.tasks.exemplars import Exemplars, cropped, read_exemplars

EMBEDDING_FILE = "learned_embeds.safetensors"
"""The name that diffusers' `load_textual_inversion` looks for in a folder."""

PREPOSITIONS = (
    *("about", "above", "across", "after", "against", "along", "among", "and", "around", "as", "at", "atop"),
    *("before", "behind", "below", "beneath", "beside", "between", "beyond", "by", "down", "from", "in"),
    *("inside", "into", "left", "near", "next", "of", "off", "on", "onto", "out", "outside", "over", "past"),
    *("right", "through", "to", "toward", "under", "underneath", "up", "upon", "with", "within", "without"),
)
"""Towards which a relation is steered; those that a model's tokenizer has as one token. Among them the words
that build prepositions ("left of", "next to") and "and", with which ReVersion begins."""

UNIMPORTANT = ("a", "an", "the", "is", "are", "some", "two", "it", "its")
"""Words of captions from which a relation is not steered away."""

TEMPLATES = (
    "a {}",
    "a picture of a {}",
    "an image of a {}",
    "a drawing of a {}",
    "a photo of a {}",
    "a rendering of a {}",
    "a close photo of a {}",
    "a good photo of a {}",
    "a photo of one {}",
    "the photo of a {}",
)
"""Captions of a subject without captions; those whose words a model's tokenizer has as one token each."""

TOKENS = {"relation": "<R>", "subject": "<S>"}
INITIALIZERS = {"relation": "and", "subject": "picture"}
LEARNING_RATES = {"relation": 0.2, "subject": 0.4}


@dataclass(frozen=True)
class InvertConfig:
    """Learn what images share as a new word, on a multi-step Stable Diffusion model."""

    examples: Path
    """Folder of images. Captions in metadata.jsonl or metadata.csv (file_name, text) or in a .txt file
    beside each image hold the new word, as "a panda <R> a rocket" for a relation; a subject needs none."""
    out: Path = Path("runs/inversion")
    """Folder to write: learned_embeds.safetensors, inversion.json, pictures.png. New or empty."""
    model: str | None = None
    """Folder or hub id of the multi-step model; the teacher that comes with wadi if not given."""
    kind: Literal["auto", "relation", "subject"] = "auto"
    """What is learned; auto: a relation if the new word stands between two objects in the first caption."""
    token: str | None = None
    """The new word; <R> or <S> if not given."""
    initializer_token: str | None = None
    """A word that the new one begins as; "and" for a relation and "picture" for a subject if not given."""
    num_vectors: int = 1
    """Embeddings that the new word consists of. With several the word must be in lower case."""
    max_train_steps: int = 400
    """Updates."""
    train_batch_size: int = 8
    """Images an update."""
    learning_rate: float | None = None
    """Learning rate of AdamW at its peak, as a multiple of the root mean square of the numbers of
    --initializer-token's embedding, which differs between models; falls to zero along a cosine. If not given,
    0.2 for a relation and 0.4 for a subject, whose word has to go further."""
    steering_weight: float = 0.01
    """Weight of the loss that steers a relation towards prepositions; 0 omits it."""
    steering_temperature: float = 0.07
    """Temperature of that loss."""
    num_positives: int = 4
    """Prepositions of that loss, drawn anew every update."""
    prepositions: tuple[str, ...] = ()
    """Words to steer towards, one token each; a list of English ones if none are given."""
    focal_alpha: float = 0.5
    """How much more often high noise is drawn, 0 (not at all) to 1; for a relation only."""
    lowest_timestep: int = 0
    """No timestep below is drawn; for a relation only. What is where is decided at high noise, and a one-step
    student knows only the last timestep; ReVersion draws all."""
    seed: int = 0
    """Seed of everything that is random."""
    gradient_checkpointing: bool = False
    """Compute activations of the U-Net twice instead of keeping them: less memory, more time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the networks; the new embeddings are always float32."""
    device: str | None = None
    """Such as cpu or cuda:1; a GPU if there is one."""


@dataclass(frozen=True)
class Inversion:
    """A learned word.

    Attributes:
        token: the word.
        embedding: (n, D) float32, on the CPU.
        kind: "relation" or "subject".
        captions: of the exemplars; templates for a subject without any.
        losses: denoising loss of every update that was done.
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
            folder: made if missing.
            overwrite: replace the file if there is one already.

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


def steering_loss(
    relation: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, temperature: float = 0.07
) -> torch.Tensor:
    r"""Relation-steering contrastive loss of ReVersion (arXiv 2303.13495): InfoNCE with several positives.

        - log( p / (p + n) ),  p = sum_l exp(cos(R, P_l) / gamma),  n = sum_m exp(cos(R, N_m) / gamma)

    Args:
        relation: (n, D) embeddings of the new word, float.
        positives: (L, D) of prepositions.
        negatives: (M, D) of the captions' other words.
        temperature: gamma.

    Returns:
        Scalar, the mean over the n.
    """
    unit = F.normalize(relation, dim=1)
    attracted = unit @ F.normalize(positives, dim=1).T / temperature
    repelled = unit @ F.normalize(negatives, dim=1).T / temperature
    return (torch.cat([attracted, repelled], 1).logsumexp(1) - attracted.logsumexp(1)).mean()


def focal_density(num_timesteps: int, alpha: float, lowest: int = 0) -> torch.Tensor:
    r"""Relation-focal importance sampling of ReVersion (arXiv 2303.13495): how often each timestep is drawn.

        f(t) = (1 - alpha cos(pi t / T)) / T

    at t + 1/2, so that it sums to one exactly: sum of f up to t is
    (t + 1) / T - alpha sin(pi (t + 1) / T) / (2 T sin(pi / (2 T))).

    Args:
        num_timesteps: T.
        alpha: 0 draws all alike; 1 never the first.
        lowest: of the timesteps below none is drawn, of the others as often relative to each other.

    Returns:
        (T,) float64, of sum one.
    """
    t = torch.arange(num_timesteps, dtype=torch.float64) + 0.5
    density = (1 - alpha * torch.cos(math.pi * t / num_timesteps)) / num_timesteps
    if lowest:
        density[:lowest] = 0
        density /= density.sum()
    return density


def invert(config: InvertConfig) -> Inversion:
    """Learn the word that a configuration describes; writes nothing.

    Raises:
        WadiError: an option is out of range, exemplars or model cannot be read, the model is not Stable
            Diffusion, the word is taken, or captions lack it or are too long.
    """
    _check(config)
    if config.model is None:
        raise WadiError("--model: name the folder or hub id of a multi-step Stable Diffusion model")
    exemplars = read_exemplars(config.examples)
    device = chosen_device(config.device)
    pipeline = load_pipeline(config.model, getattr(torch, config.dtype))
    check_teacher(config.model, pipeline.scheduler, network_of(pipeline))
    return learn_word(pipeline.to(device), exemplars, config)


def learn_word(pipeline: StableDiffusionPipeline, exemplars: Exemplars, config: InvertConfig) -> Inversion:
    """Train the embeddings of a new word; afterwards the pipeline is what it was, without the word.

    Args:
        pipeline: a multi-step model on its device.
        exemplars: images and captions.
        config: its `examples`, `out`, `model`, `dtype` and `device` are not looked at.

    Raises:
        WadiError: as `invert`.
    """
    return learn_words(pipeline, [(exemplars, config)])[0]


def learn_words(
    pipeline: StableDiffusionPipeline, jobs: Sequence[tuple[Exemplars, InvertConfig]]
) -> list[Inversion]:
    """Train several words in one batch, each as `learn_word` would alone, to rounding.

    That spares a small model the overhead of small batches.

    Args:
        pipeline: a multi-step model on its device.
        jobs: exemplars and options of each; all with another token and as many updates.

    Raises:
        WadiError: as `invert`, or two words have one token or another number of updates.
    """
    _check_pipeline(pipeline)
    generators = [torch.Generator().manual_seed(config.seed) for _, config in jobs]
    words = [_Word(pipeline, *job, generator) for job, generator in zip(jobs, generators, strict=True)]
    if len({word.token for word in words}) < len(words):
        raise WadiError("learn_words: every word needs a token of its own")
    if len({config.max_train_steps for _, config in jobs}) > 1:
        raise WadiError("learn_words: all words need as many updates")
    with _known(pipeline, words):
        for word in words:
            word.ids = _tokenize(pipeline, word.captions)
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


def _check(config: InvertConfig) -> None:
    check_seed(config.seed, name="--seed")
    for name in ("num_vectors", "max_train_steps", "train_batch_size", "num_positives"):
        if getattr(config, name) < 1:
            raise WadiError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    if not 0 <= config.focal_alpha <= 1:
        raise WadiError(f"--focal-alpha {config.focal_alpha}: must be between 0 and 1")
    if config.lowest_timestep < 0:
        raise WadiError(f"--lowest-timestep {config.lowest_timestep}: must not be negative")
    for name in ("learning_rate", "steering_temperature"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise WadiError(f"--{name.replace('_', '-')} {value}: must be positive")
    if not 0 <= config.steering_weight < math.inf:
        raise WadiError(f"--steering-weight {config.steering_weight}: must not be negative")


def _check_pipeline(pipeline: Any) -> None:
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise WadiError(
            f"--model: is a {type(pipeline).__name__}; a word can be learned on a StableDiffusionPipeline"
        )
    if "beta_schedule" not in pipeline.scheduler.config:
        raise WadiError("--model: its scheduler has no betas; name a model with a DDPM-like noise schedule")
    prediction_type = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise WadiError(
            f"--model: predicts {prediction_type!r}; name one that predicts epsilon or v_prediction"
        )
    if not isinstance(pipeline.unet.config.sample_size, int):
        raise WadiError("--model: its images are not square, and a word is learned on square ones")


def _kind_and_token(config: InvertConfig, exemplars: Exemplars) -> tuple[str, str]:
    kind, captions = config.kind, exemplars.captions
    if kind == "auto":
        relation = captions is not None and _stands_between(captions[0], config.token or TOKENS["relation"])
        kind = "relation" if relation else "subject"
    token = config.token or TOKENS[kind]
    if token != token.strip() or not token or " " in token:
        raise WadiError(f"--token {token!r}: must be one word, such as {TOKENS[kind]}")
    if config.num_vectors > 1 and token != token.lower():
        raise WadiError(
            f"--token {token}: a word of several vectors must be in lower case, as {token.lower()}; "
            "diffusers finds no other in a prompt"
        )
    if kind == "relation" and captions is None:
        raise WadiError(
            f'{config.examples}: a relation needs captions, as "a panda {token} a rocket"; write them to '
            "metadata.jsonl there"
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


def _captions(pipeline: StableDiffusionPipeline, exemplars: Exemplars, token: str) -> list[str]:
    if exemplars.captions is not None:
        return list(exemplars.captions)
    known = [
        template
        for template in TEMPLATES
        if all(_one_token(pipeline, word) is not None for word in template.replace("{}", "").split())
    ]
    return [template.format(token) for template in known or TEMPLATES]


def _one_token(pipeline: StableDiffusionPipeline, word: str) -> int | None:
    ids = pipeline.tokenizer(word, add_special_tokens=False).input_ids
    return ids[0] if len(ids) == 1 else None


def _word(pipeline: StableDiffusionPipeline, word: str, option: str) -> torch.Tensor:
    """(D,) float32 embedding of a word that is one token, on the CPU."""
    index = _one_token(pipeline, word)
    if index is None:
        raise WadiError(f"{option} {word}: is not one token of this model; name another word")
    return pipeline.text_encoder.get_input_embeddings().weight[index].detach().float().cpu()


def _tokenize(pipeline: StableDiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """(N, L) int64 on the CPU, as the pipeline's `encode_prompt` has them."""
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
def _encode(pipeline: StableDiffusionPipeline, exemplars: Exemplars) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and deviations of the images' latents, (N, C, h, w) float32 each, scaled, on the CPU."""
    height, width = own_size(pipeline)
    means, deviations = [], []
    for image in exemplars.images:
        pixels = torch.from_numpy(np.array(cropped(image, height, width))).permute(2, 0, 1)[None]
        pixels = (pixels.float() / 127.5 - 1).to(pipeline.vae.device, pipeline.vae.dtype)
        latents = pipeline.vae.encode(pixels).latent_dist
        means.append(latents.mean.float().cpu())
        deviations.append(latents.std.float().cpu())
    scale = pipeline.vae.config.scaling_factor
    return torch.cat(means) * scale, torch.cat(deviations) * scale


@contextmanager
def _known(pipeline: StableDiffusionPipeline, words: Sequence[_Word]) -> Iterator[None]:
    """Within the block the pipeline knows the words, whose embeddings are the parameters `word.rows`.

    `unload_textual_inversion` would renumber words that were there before, where, as in the emoji world, the
    special tokens are not the last ones of the vocabulary.
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


def _replacing(pipeline: StableDiffusionPipeline, words: Sequence[_Word]) -> Callable:
    """A hook of the table of embeddings that puts `word.rows` where the words are."""
    # `load_textual_inversion` numbers them one after the other, from the end of the vocabulary on
    first = pipeline.tokenizer.convert_tokens_to_ids(words[0].token)

    def replace_rows(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor):
        ids, rows = inputs[0], torch.cat([word.rows for word in words]).to(output)
        return torch.where((ids >= first)[..., None], rows[(ids - first).clamp(min=0)], output)

    return replace_rows


@contextmanager
def _frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """No parameter of the modules asks for a gradient within the block."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Steering:
    """Positives and negatives of `steering_loss`.

    Args:
        pipeline: holds tokenizer and embeddings.
        captions: whose words are the negatives, each its own.
        token: the new word.
        config: names the prepositions.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, captions: Sequence[str], token: str, config: InvertConfig
    ) -> None:
        if config.prepositions:
            self.positives = torch.stack(
                [_word(pipeline, word, "--prepositions") for word in config.prepositions]
            )
        else:
            found = [word for word in PREPOSITIONS if _one_token(pipeline, word) is not None]
            if not found:
                raise WadiError(
                    "--prepositions: this model has no English preposition as one token; name words of its "
                    "own, or --steering-weight 0"
                )
            self.positives = torch.stack([_word(pipeline, word, "--prepositions") for word in found])
        left_out = {*UNIMPORTANT, *PREPOSITIONS, *config.prepositions, token.lower()}
        table = pipeline.text_encoder.get_input_embeddings().weight.detach()
        self.negatives = []
        for caption in captions:
            words = " ".join(word for word in caption.lower().split() if word not in left_out)
            ids = sorted(set(pipeline.tokenizer(words, add_special_tokens=False).input_ids))
            self.negatives.append(table[ids].float().cpu())
        self.count, self.temperature = config.num_positives, config.steering_temperature

    def __call__(
        self, rows: torch.Tensor, captions: Sequence[int], generator: torch.Generator
    ) -> torch.Tensor:
        """The loss of `rows` (n, D), with the words of these captions as negatives."""
        chosen = torch.randperm(len(self.positives), generator=generator)[: self.count]
        negatives = torch.cat([self.negatives[i] for i in captions])
        return steering_loss(rows, self.positives[chosen], negatives, self.temperature)


@dataclass(frozen=True)
class _Batch:
    """What one update of one word is made of, on the CPU.

    Attributes:
        latents: (B, C, h, w) float32.
        noise: (B, C, h, w) float32.
        timesteps: (B,) int64.
        chosen: which captions.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    chosen: list[int]


class _Word:
    """A word that is learned: its embeddings, its exemplars, and what is drawn of them.

    All of it is small and on the CPU; a batch and the embeddings are sent to the device once an update.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        exemplars: Exemplars,
        config: InvertConfig,
        generator: torch.Generator,
    ) -> None:
        self.config, self.generator, self.losses = config, generator, []
        self.kind, self.token = _kind_and_token(config, exemplars)
        self.captions, self.own = _captions(pipeline, exemplars, self.token), exemplars.captions is not None
        relation = self.kind == "relation"
        count = pipeline.scheduler.config.num_train_timesteps
        if config.lowest_timestep >= count:
            raise WadiError(f"--lowest-timestep {config.lowest_timestep}: the model has {count} timesteps")
        focal = (config.focal_alpha, config.lowest_timestep) if relation else (0.0, 0)
        self.density = focal_density(count, *focal)
        self.steer = None
        if relation and config.steering_weight:
            self.steer = _Steering(pipeline, self.captions, self.token, config)
        initial = _word(pipeline, config.initializer_token or INITIALIZERS[self.kind], "--initializer-token")
        self.ids = torch.zeros(0)  # of the captions, once the pipeline knows the word
        self.rows = torch.nn.Parameter(initial.repeat(config.num_vectors, 1))
        scale = initial.square().mean().sqrt().item()
        self.learning_rate = scale * (config.learning_rate or LEARNING_RATES[self.kind])
        self.means, self.deviations = _encode(pipeline, exemplars)

    def draw(self) -> _Batch:
        """Draw a batch on the CPU, so that it is the same on every device."""
        size, count = self.config.train_batch_size, len(self.means)
        pictures = torch.randint(count, (size,), generator=self.generator)
        # a subject's templates are for any image
        chosen = (
            pictures if self.own else torch.randint(len(self.captions), (size,), generator=self.generator)
        )
        shape = (size, *self.means.shape[1:])
        variation = torch.randn(shape, generator=self.generator)
        noise = torch.randn(shape, generator=self.generator)
        timesteps = torch.multinomial(self.density, size, replacement=True, generator=self.generator)
        latents = self.means[pictures] + self.deviations[pictures] * variation
        return _Batch(latents, noise, timesteps, chosen.tolist())

    def loss(self, denoising: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """Denoising loss, and the steering loss of a relation."""
        if self.steer is None:
            return denoising
        steering = self.steer(self.rows, batch.chosen, self.generator)
        return denoising + self.config.steering_weight * steering


def _train(pipeline: StableDiffusionPipeline, words: Sequence[_Word], steps: int) -> bool:
    """Update the words' embeddings; returns whether Ctrl-C ended it."""
    schedule = Schedule.from_config(pipeline.scheduler).to(pipeline.unet.device)
    groups = [{"params": [word.rows], "lr": word.learning_rate} for word in words]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = progress(range(steps), desc="new word", unit="step")
    try:
        with _frozen(pipeline.unet, pipeline.vae, pipeline.text_encoder):
            for step in bar:
                batches = [word.draw() for word in words]
                denoising = _denoising_losses(pipeline, schedule, words, batches)
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


def _denoising_losses(
    pipeline: StableDiffusionPipeline,
    schedule: Schedule,
    words: Sequence[_Word],
    batches: Sequence[_Batch],
) -> torch.Tensor:
    """(K,) mean squared error of the prediction for each word's batch; one forward for all."""
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
