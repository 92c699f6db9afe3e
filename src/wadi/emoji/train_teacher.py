"""`wadi emoji train-teacher`: the multi-step pipeline of the small world, Stable Diffusion or PixArt-alpha.

Text encoder and U-Net (or transformer) are trained together on latents of endless scenes, with SD's noise
schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from wadi.diffusion import Schedule
from wadi.emoji.captions import Caption, sample_captions, stated
from wadi.emoji.clock import TimedSteps, warmup_cosine
from wadi.emoji.dit import new_t5_encoder, new_transformer, predict_noise
from wadi.emoji.glyphs import load_atlas
from wadi.emoji.recombine import VARIANTS, Recombination
from wadi.emoji.scenes import render, sample_scenes
from wadi.emoji.tokenizer import MAX_LENGTH, build_t5_tokenizer, build_tokenizer
from wadi.emoji.updates import AveragedAdamW
from wadi.errors import WadiError
from wadi.graph import record
from wadi.onestep.components import load_module
from wadi.onestep.loading import pipeline_class_name
from wadi.outputs import Output
from wadi.progress import progress

ENCODED_BATCH = 2000
"""Images at a time when latents are encoded ahead."""

FOCUS_TIMESTEP = 300
"""Lowest timestep of the pairs that `pair_focus` adds."""

PIPELINES = {"unet": StableDiffusionPipeline, "dit": PixArtAlphaPipeline}
"""By architecture, what is written."""

LEARNING_RATES = {"unet": 1e-3, "dit": 6e-4}
"""Peaks, by architecture."""

TextEncoder = CLIPTextModel | T5EncoderModel
Tokenizer = CLIPTokenizer | T5Tokenizer
Denoiser = UNet2DConditionModel | PixArtTransformer2DModel


@dataclass
class TrainTeacherConfig:
    """Train the text encoder and the U-Net or transformer of the emoji world; write the whole pipeline."""

    vae: Path
    """AutoencoderKL folder of `wadi emoji train-vae`."""
    out: Path
    """Pipeline folder to write (float16 safetensors)."""
    init: Path | None = None
    """Pipeline folder of the same architecture whose weights to go on from, instead of random ones."""
    init_share: float = 0.0
    """Share of the weights of `init` in what is written; the rest is the new weights. Half keeps more of what
    training never shows (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022)."""
    atlas: Path | None = None
    """Atlas file of `wadi emoji atlas`; drawn from the font if not given."""
    seconds: float = 420.0
    """Training time, without the encoding of the images."""
    max_train_steps: int = 1_000_000
    """Stop after this many steps even if time is left."""
    train_batch_size: int = 512
    """Latents a step."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; falls to zero along a cosine of the time used. If not given, 1e-3 for the
    U-Net and 6e-4 for the transformer, whose training diverged at 1e-3."""
    ema_decay: float = 0.9993
    """Decay of the average of the weights, which is written."""
    pictures: int = 400_000
    """Latents encoded ahead."""
    captions: int = 150_000
    """Different captions among them."""
    pair_focus: float = 0.0
    """Share of the training, from its start, in which half of every batch is pairs of objects at high noise,
    where it is decided what is where. Without it the order of two objects is learned last."""
    recombine: float = 0.0
    """Share of the captions of which every word's state comes from a caption with other emoji beside it, so
    that the U-Net must read the word, not what it knows of its company."""
    architecture: Literal["unet", "dit"] = "unet"
    """A U-Net with CLIP's text encoder (StableDiffusionPipeline), or PixArt-alpha's transformer with T5's
    (PixArtAlphaPipeline)."""
    compile: bool = False
    """Compile the U-Net or transformer first (about a minute); then its steps take less time."""
    seed: int = 0
    """Seed of everything that is random."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    overwrite: bool = False
    """Replace the folder if this command wrote it and nothing else is in it."""


def new_unet() -> UNet2DConditionModel:
    """7.75 M parameters, three cross-attention levels."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 3, 5),
        use_linear_projection=True,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Three layers, 128 wide, 24 tokens."""
    end = tokenizer.eos_token_id
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, sampled by DDIM from the last timestep on.

    For the transformer too: PixArt's linear schedule ends at alpha_T^2 = 4.0e-5, where one step would magnify
    errors of epsilon 157 times instead of 15 (and its students were trained with SD's alpha_T all the same).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def tokenize(tokenizer: Tokenizer, prompts: list[str]) -> torch.Tensor:
    """(N, 24) int64, padded as StableDiffusionPipeline does; PixArtAlphaPipeline pads more, and masks it."""
    return tokenizer(
        prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_pool(
    config: TrainTeacherConfig,
    vae: AutoencoderKL,
    tokenizer: Tokenizer,
    captions: list[Caption],
    pictures: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (N, 4, 16, 16) bfloat16 of fresh scenes, tokens (N, 24) and facts (N, 6) of their captions.

    On the device; the facts are those of `Recombination`, nothing (N, 0) where it is not asked for.
    """
    device = torch.device(config.device)
    atlas = load_atlas(config.atlas).to(device).float() / 255
    generator = torch.Generator(device).manual_seed(seed)
    tokens = tokenize(tokenizer, [caption.text for caption in captions]).to(device)
    columns = {name: column.to(device) for name, column in stated(captions).items()}
    facts = torch.zeros(len(captions), 0, dtype=torch.int64)
    if config.recombine:
        facts = Recombination(tokenizer, "cpu").facts(captions)
    facts = facts.to(device)
    latents, ids, known = [], [], []
    for _ in progress(range(math.ceil(pictures / ENCODED_BATCH)), desc="images", unit="batch"):
        index = torch.randint(len(captions), (ENCODED_BATCH,), generator=generator, device=device)
        images = render(
            sample_scenes({name: column[index] for name, column in columns.items()}, generator), atlas
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents.append(vae.encode(2 * images - 1).latent_dist.mean.bfloat16())
        ids.append(tokens[index])
        known.append(facts[index])
    return torch.cat(latents), torch.cat(ids), torch.cat(known)


def take_states(states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The state of each token from one of V captions.

    Args:
        states: (N V, L, D), V captions for each.
        source: (N, L) int64, which of them.

    Returns:
        (N, L, D).
    """
    states = states.unflatten(0, (len(source), -1))
    return states.take_along_dim(source[:, None, :, None], 1)[:, 0]


class TeacherTraining:
    """One training step of the two networks, captured as a CUDA graph where there is a GPU."""

    def __init__(
        self,
        config: TrainTeacherConfig,
        network: Denoiser,
        text_encoder: TextEncoder,
        empty: torch.Tensor,
    ):
        self.config, self.text_encoder = config, text_encoder
        self.device = torch.device(config.device)
        parameters = [*network.parameters(), *text_encoder.parameters()]
        self.update = AveragedAdamW(parameters, config.ema_decay, self.device)
        self.parameters, self.ema = self.update.parameters, self.update.ema
        self.schedule = Schedule.from_config(new_scheduler()).to(self.device)
        size = config.train_batch_size
        self.latents = torch.zeros(size, 4, 16, 16, device=self.device)
        self.noise = torch.zeros_like(self.latents)
        self.timesteps = torch.zeros(size, dtype=torch.int64, device=self.device)
        # of each caption, the captions whose states it is made of, and which token's is whose
        self.ids = empty.to(self.device).repeat(size, VARIANTS if config.recombine else 1, 1)
        self.source = torch.zeros(size, self.ids.shape[2], dtype=torch.int64, device=self.device)
        self.empty = empty.to(self.device)
        self.loss = torch.zeros((), device=self.device)
        self.predict = torch.compile(network) if config.compile else network
        # the learning rate is zero before the first step: nothing comes of the runs before the recording
        self.run = record(self._step)[0].replay if self.device.type == "cuda" else self._step

    def _step(self) -> None:
        # cache_enabled: a captured graph must not keep casts of weights from an earlier step.
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False
        ):
            noisy = self.schedule.add_noise(self.latents, self.noise, self.timesteps)
            if self.config.architecture == "dit":
                ids = self.ids[:, 0]
                prediction = predict_noise(self.predict, self.text_encoder, noisy, self.timesteps, ids)
            else:
                ids = self.ids.flatten(0, 1)
                states = self.text_encoder(ids)[0]
                mixed = take_states(states, self.source)
                prediction = self.predict(noisy, self.timesteps, mixed, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), self.noise)
        self.update(loss)
        self.loss.copy_(loss.detach())

    def step(
        self,
        latents: torch.Tensor,
        ids: torch.Tensor,
        step: int,
        rate: float,
        generator: torch.Generator,
        lowest: torch.Tensor | int = 0,
        source: torch.Tensor | int = 0,
    ) -> None:
        """Draw timesteps from `lowest` up and noise, leave out a tenth of the captions, and update.

        `ids` are (N, V, 24), V captions for each latent; `source` says which one lends each token's state.
        """
        size = len(latents)
        uniform = torch.rand(size, generator=generator, device=self.device)
        self.latents.copy_(latents)
        self.noise.copy_(torch.randn(latents.shape, generator=generator, device=self.device))
        self.timesteps.copy_(lowest + (uniform * (1000 - lowest)).long())
        drop = torch.rand(size, 1, 1, generator=generator, device=self.device) < 0.1
        self.ids.copy_(torch.where(drop, self.empty, ids))
        self.source.copy_(source) if isinstance(source, torch.Tensor) else self.source.fill_(source)
        self.update.prepare(step, rate)
        self.run()


def _networks(config: TrainTeacherConfig, tokenizer: Tokenizer) -> tuple[Denoiser, TextEncoder]:
    device, dit = torch.device(config.device), config.architecture == "dit"
    if config.init is None:
        network = new_transformer() if dit else new_unet()
        text_encoder = new_t5_encoder(tokenizer) if dit else new_text_encoder(tokenizer)
        return network.to(device), text_encoder.to(device)
    kind, part = (PixArtTransformer2DModel, "transformer") if dit else (UNet2DConditionModel, "unet")
    network = load_module(kind, config.init / part, torch.float32)
    encoder_kind = T5EncoderModel if dit else CLIPTextModel
    text_encoder = load_module(encoder_kind, config.init / "text_encoder", torch.float32)
    return network.to(device).train(), text_encoder.to(device).train()


def _check(config: TrainTeacherConfig) -> None:
    if not 0 <= config.init_share <= 1 or (config.init_share and config.init is None):
        raise WadiError(f"--init-share {config.init_share}: must be between 0 and 1, and needs --init")
    if not 0 <= config.recombine <= 1:
        raise WadiError(f"--recombine {config.recombine}: must be between 0 and 1")
    if config.recombine and config.architecture == "dit":
        raise WadiError(
            f"--recombine {config.recombine}: only for --architecture unet, whose text encoder reads from "
            "the left and tells a name nothing of what follows; omit it"
        )
    if config.init is None:
        return
    name, wanted = pipeline_class_name(config.init), PIPELINES[config.architecture].__name__
    if name != wanted:
        raise WadiError(
            f"--init {config.init}: holds a {name}; --architecture {config.architecture} needs a {wanted}"
        )


def train_teacher(config: TrainTeacherConfig) -> dict[str, float]:
    """Train and write the pipeline folder; returns steps, seconds and the last loss.

    Raises:
        WadiError: a share of `init` outside 0 to 1, or without `init`; an `init` of another architecture, or
            that is no pipeline folder; a share out of range, or of captions to recombine for a transformer.
    """
    _check(config)
    inputs = (config.vae, config.init, config.atlas)
    output = Output(config.out, "emoji train-teacher", inputs, config.overwrite)
    output.check()
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    tokenizer = build_t5_tokenizer() if config.architecture == "dit" else build_tokenizer()
    vae = load_module(AutoencoderKL, config.vae, torch.float32).to(device).requires_grad_(False)
    captions = sample_captions(config.captions, "teacher")
    pool = encode_pool(config, vae, tokenizer, captions, config.pictures, config.seed)
    pairs = pool
    if config.pair_focus:
        two = [caption for caption in captions if caption.relation is not None]
        pairs = encode_pool(config, vae, tokenizer, two, config.pictures // 2, config.seed + 2)
    network, text_encoder = _networks(config, tokenizer)
    initial = [p.detach().clone() for p in (*network.parameters(), *text_encoder.parameters())]
    training = TeacherTraining(config, network, text_encoder, tokenize(tokenizer, [""]))
    recombination = Recombination(tokenizer, device) if config.recombine else None
    steps = _fit(training, pool, pairs, recombination)
    for parameter, average, start in zip(training.parameters, training.ema, initial, strict=True):
        parameter.data.copy_(average.lerp(start, config.init_share))
    write_pipeline(output, vae, text_encoder, tokenizer, network)
    return {"steps": steps.done, "seconds": steps.elapsed, "loss": training.loss.item()}


def _fit(
    training: TeacherTraining,
    pool: tuple[torch.Tensor, ...],
    pairs: tuple[torch.Tensor, ...],
    recombination: Recombination | None,
) -> TimedSteps:
    config, device, size = training.config, training.device, training.config.train_batch_size
    peak = LEARNING_RATES[config.architecture] if config.learning_rate is None else config.learning_rate
    generator = torch.Generator(device).manual_seed(config.seed + 1)
    # While focused, the first half of a batch is pairs.
    lowest = torch.where(torch.arange(size, device=device) < size // 2, FOCUS_TIMESTEP, 0)
    steps = TimedSteps(config.seconds, config.max_train_steps, "teacher")
    for step, used in steps:
        index = torch.randint(len(pool[0]), (size,), generator=generator, device=device)
        batch, focused = [column[index] for column in pool], used < config.pair_focus
        if focused:
            index = torch.randint(len(pairs[0]), (size // 2,), generator=generator, device=device)
            for column, other in zip(batch, pairs, strict=True):
                column[: size // 2] = other[index]
        latents, ids, facts = batch
        ids, source = ids[:, None], 0
        if recombination is not None:
            ids, source = recombination.draw(ids[:, 0], facts, config.recombine, generator)
        rate = peak * warmup_cosine(step, used, 500)
        training.step(latents.float(), ids, step, rate, generator, lowest if focused else 0, source)
        steps.show(training.loss)
    return steps


def write_pipeline(
    output: Output,
    vae: AutoencoderKL,
    text_encoder: TextEncoder,
    tokenizer: Tokenizer,
    network: Denoiser,
) -> None:
    """Write a StableDiffusionPipeline folder, or PixArtAlphaPipeline for a transformer, in float16."""
    shared = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": new_scheduler()}
    if isinstance(network, PixArtTransformer2DModel):
        pipeline = PixArtAlphaPipeline(transformer=network, **shared)
    else:
        pipeline = StableDiffusionPipeline(
            unet=network,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **shared,
        )
    with output.writing() as temporary:
        pipeline.to(torch.float16).save_pretrained(temporary, safe_serialization=True)
