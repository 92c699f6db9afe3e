"""`wadi emoji train-teacher`: the multi-step pipeline of the emoji world, Stable Diffusion or PixArt-alpha.

The text encoder and the U-Net (or transformer) are trained together on latents of endless scenes, with Stable
Diffusion's noise schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from wadi.emoji.captions import Caption, sample_captions
from wadi.emoji.clock import TimedSteps, warmup_cosine
from wadi.emoji.dit import new_t5_encoder, new_transformer, predict_noise
from wadi.emoji.recombine import VARIANTS, Recombination
from wadi.emoji.tokenizer import MAX_LENGTH, build_t5_tokenizer, build_tokenizer, tokenize
from wadi.emoji.training import LatentTraining, TrainOptions, encoded_scenes, joined, prepare_torch
from wadi.errors import WadiError
from wadi.onestep.components import load_module
from wadi.onestep.loading import pipeline_class_name
from wadi.outputs import Output

FOCUS_TIMESTEP = 300
"""Lowest timestep of the pairs that `pair_focus` adds."""

PIPELINES = {"unet": StableDiffusionPipeline, "dit": PixArtAlphaPipeline}
"""Class of the written pipeline, by architecture."""

LEARNING_RATES = {"unet": 1e-3, "dit": 6e-4}
"""Highest learning rate, by architecture."""

TextEncoder = CLIPTextModel | T5EncoderModel
Tokenizer = CLIPTokenizer | T5Tokenizer
Denoiser = UNet2DConditionModel | PixArtTransformer2DModel


@dataclass
class TrainTeacherConfig(TrainOptions):
    """Train the text encoder and the U-Net or transformer of the emoji world; write the whole pipeline."""

    vae: Path
    """AutoencoderKL folder of `wadi emoji train-vae`."""
    out: Path
    """Pipeline folder to write (float16 safetensors)."""
    init: Path | None = None
    """Pipeline folder of the same architecture whose weights the training starts from; random weights if not
    given."""
    init_share: float = 0.0
    """Share of the weights of --init in the written weights; the rest are the new weights. A half keeps more
    of what training never shows (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022)."""
    seconds: float = 420.0
    """Training time, without the time to encode the images."""
    train_batch_size: int = 512
    """Latents in each step."""
    learning_rate: float | None = None
    """Highest learning rate of AdamW; it falls to zero along a cosine of the time used. If not given, it is
    1e-3 for the U-Net and 6e-4 for the transformer, whose training diverged at 1e-3."""
    ema_decay: float = 0.9993
    """Decay of the moving average of the weights, which is written."""
    pictures: int = 400_000
    """Number of images that are encoded before the training."""
    captions: int = 150_000
    """Number of different captions among them."""
    pair_focus: float = 0.0
    """Share of the training, from its start, in which half of every batch shows pairs of objects at high
    noise, where the layout is decided. Without it the order of two objects is learned last."""
    recombine: float = 0.0
    """Share of the captions in which the state of every word comes from a caption with other emoji beside it.
    The U-Net must then read the word itself, not what the word knows of its neighbours."""
    architecture: Literal["unet", "dit"] = "unet"
    """unet: a U-Net with CLIP's text encoder (StableDiffusionPipeline); dit: PixArt-alpha's transformer with
    a T5 encoder (PixArtAlphaPipeline)."""
    compile: bool = False
    """Compile the U-Net or transformer first, which takes about a minute; its steps are then faster."""


def new_unet() -> UNet2DConditionModel:
    """A U-Net with random weights: 7.75 M parameters, three levels with cross-attention."""
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
    """A CLIP text encoder with random weights: three layers, 128 wide, 24 tokens."""
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

    The transformer has it too. PixArt's own linear schedule ends at alpha_T^2 = 4.0e-5, where one step would
    magnify errors of epsilon 157 times instead of 15 times.
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


def encode_pool(
    config: TrainTeacherConfig,
    vae: AutoencoderKL,
    tokenizer: Tokenizer,
    captions: list[Caption],
    count: int,
    seed: int,
) -> tuple[torch.Tensor, ...]:
    """Encode scenes of captions before the training.

    Returns:
        Latents (N, 4, 16, 16) bfloat16, tokens (N, 24) of their captions, and facts (N, 6) of the captions
        for `Recombination`, or (N, 0) where --recombine is 0; on the device.
    """
    tokens = tokenize(tokenizer, [caption.text for caption in captions]).to(config.device)
    facts = torch.zeros(len(captions), 0, dtype=torch.int64)
    if config.recombine:
        facts = Recombination(tokenizer, "cpu").facts(captions)
    facts = facts.to(config.device)
    batches = encoded_scenes(config, vae, captions, count, seed)
    return joined((latents, tokens[index], facts[index]) for latents, index, *_ in batches)


def take_states(states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Take the state of each token from one of V captions.

    Args:
        states: (N V, L, D) states of V captions for each latent.
        source: (N, L) int64, the caption whose state is taken.

    Returns:
        (N, L, D).
    """
    states = states.unflatten(0, (len(source), -1))
    return states.take_along_dim(source[:, None, :, None], 1)[:, 0]


class TeacherTraining(LatentTraining):
    """The training of the denoiser and the text encoder; `source` says which caption lends each state."""

    def __init__(
        self,
        config: TrainTeacherConfig,
        network: Denoiser,
        text_encoder: TextEncoder,
        empty: torch.Tensor,
    ):
        parameters = [*network.parameters(), *text_encoder.parameters()]
        variants = VARIANTS if config.recombine else 1
        super().__init__(config, parameters, new_scheduler(), empty, variants=variants)
        self.text_encoder = text_encoder
        self.source = torch.zeros_like(self.ids[:, 0])
        self.network = torch.compile(network) if config.compile else network
        self.start()

    def predict(self, noisy: torch.Tensor) -> torch.Tensor:
        """See `LatentTraining.predict`."""
        if self.config.architecture == "dit":
            ids = self.ids[:, 0]
            return predict_noise(self.network, self.text_encoder, noisy, self.timesteps, ids)
        states = self.text_encoder(self.ids.flatten(0, 1))[0]
        mixed = take_states(states, self.source)
        return self.network(noisy, self.timesteps, mixed, return_dict=False)[0]

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
        """Do `LatentTraining.step`, with the caption (N, L) that lends the state of each token."""
        self.source[:] = source
        super().step(latents, ids, step, rate, generator, lowest)


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
            f"--recombine {config.recombine}: only for --architecture unet, whose text encoder reads "
            "from left to right; omit it"
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
        WadiError: an option is outside its range or does not fit the others, `init` is of another
            architecture, or a folder cannot be read or may not be written.
    """
    _check(config)
    inputs = (config.vae, config.init, config.atlas)
    output = Output(config.out, "emoji train-teacher", inputs, config.overwrite)
    output.check()
    device = prepare_torch(config)
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
    # during the focus, the first half of a batch shows pairs
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
