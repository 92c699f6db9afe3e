"""`wadi emoji train-teacher`: the multi-step pipeline of the emoji world.

The text encoders and the denoiser of any `Architecture` are trained together on latents of endless scenes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL

from wadi.emoji.architecture import Architecture, Networks
from wadi.emoji.captions import Caption, sample_captions
from wadi.emoji.checkpoints import TimedCheckpoints
from wadi.emoji.clock import TimedSteps, warmup_cosine
from wadi.emoji.dit import DiT
from wadi.emoji.flow import Flow
from wadi.emoji.recombine import VARIANTS, Recombination
from wadi.emoji.training import LatentTraining, TrainOptions, encoded_scenes, joined, prepare_torch
from wadi.emoji.unet import UNet
from wadi.errors import WadiError
from wadi.files import write_json
from wadi.onestep.arguments import whole_number
from wadi.onestep.components import load_module
from wadi.onestep.loading import pipeline_class_name
from wadi.outputs import Output

FOCUS = 0.3
"""Lowest level of noise of the pairs that `pair_focus` adds, as a fraction of the range."""

ARCHITECTURES: dict[str, Callable[[], Architecture]] = {"unet": UNet, "dit": DiT, "flow": Flow}
"""The kinds of teachers by the value of --architecture."""

FIGURES = "training.json"
"""File in the pipeline folder with the options and figures of the training."""

FREE = ("out", "overwrite", "compile", "checkpoints", "checkpointing_seconds")
"""Options that may differ when a training goes on from a checkpoint."""


@dataclass
class TrainTeacherConfig(TrainOptions):
    """Train the text encoders and the U-Net or transformer of the emoji world; write the whole pipeline."""

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
    1e-3 for the U-Net and 6e-4 for the transformers."""
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
    architecture: Literal["unet", "dit", "flow"] = "unet"
    """unet: a U-Net with CLIP's text encoder (StableDiffusionPipeline); dit: PixArt-alpha's transformer with
    a T5 encoder (PixArtAlphaPipeline); flow: a rectified flow with the transformer of Stable Diffusion 3, two
    CLIPs and a T5 (StableDiffusion3Pipeline)."""
    compile: bool = False
    """Compile the U-Net or transformer first, which takes about a minute; its steps are then faster."""
    checkpoints: Path | None = None
    """Folder for a checkpoint of the training. If it holds one of the same options, the training goes on from
    it. Nothing is saved on the way if not given."""
    checkpointing_seconds: float = 60.0
    """Seconds of training between checkpoints."""


def encode_pool(
    config: TrainTeacherConfig,
    vae: AutoencoderKL,
    architecture: Architecture,
    captions: list[Caption],
    count: int,
    seed: int,
) -> tuple[torch.Tensor, ...]:
    """Encode scenes of captions before the training.

    Returns:
        Latents (N, 4, 16, 16) bfloat16, tokens (N, L) of their captions, and facts (N, 6) of the captions
        for `Recombination`, or (N, 0) where --recombine is 0; on the device.
    """
    tokens = architecture.tokens([caption.text for caption in captions]).to(config.device)
    facts = torch.zeros(len(captions), 0, dtype=torch.int64)
    if config.recombine:
        facts = Recombination(architecture.tokenizers["tokenizer"], "cpu").facts(captions)
    facts = facts.to(config.device)
    batches = encoded_scenes(config, vae, captions, count, seed)
    return joined((latents, tokens[index], facts[index]) for latents, index, *_ in batches)


class TeacherTraining(LatentTraining):
    """The training of the denoiser and the text encoders; `source` says which caption lends each state."""

    def __init__(self, config: TrainTeacherConfig, architecture: Architecture, networks: Networks) -> None:
        parameters = [p for network in networks.values() for p in network.parameters()]
        variants = VARIANTS if config.recombine else 1
        super().__init__(
            config, parameters, architecture.scheduler(), architecture.tokens([""]), variants=variants
        )
        self.architecture, self.networks = architecture, dict(networks)
        self.source = torch.zeros_like(self.ids[:, 0])
        if config.compile:
            denoiser = next(iter(networks))
            self.networks[denoiser] = torch.compile(networks[denoiser])
        self.start()

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """See `LatentTraining.predict`."""
        return self.architecture.predict(self.networks, noisy, timesteps, self.ids, self.source)

    def fractions(self, generator: torch.Generator) -> torch.Tensor:
        """See `LatentTraining.fractions`."""
        return self.architecture.fractions(len(self.times), generator)

    def step(
        self,
        latents: torch.Tensor,
        ids: torch.Tensor,
        step: int,
        rate: float,
        generator: torch.Generator,
        lowest: torch.Tensor | float = 0.0,
        source: torch.Tensor | int = 0,
    ) -> None:
        """Do `LatentTraining.step`, with the caption (N, L) that lends the state of each token."""
        self.source[:] = source
        super().step(latents, ids, step, rate, generator, lowest)


def _networks(config: TrainTeacherConfig, architecture: Architecture) -> Networks:
    networks = architecture.new()
    if config.init is not None:
        for name, new in networks.items():
            networks[name] = load_module(architecture.networks[name], config.init / name, torch.float32)
            if _shapes(networks[name]) != _shapes(new):
                raise WadiError(
                    f"--init {config.init}: its {name} has other sizes than one of the emoji world; name a "
                    f"folder that wadi emoji train-teacher --architecture {config.architecture} wrote"
                )
    return {name: network.to(config.device).train() for name, network in networks.items()}


def _shapes(network: torch.nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in network.parameters()]


def _check(config: TrainTeacherConfig, architecture: Architecture) -> None:
    for name in ("pictures", "captions", "train_batch_size"):
        whole_number(f"--{name.replace('_', '-')}", getattr(config, name), 1)
    if not 0 <= config.init_share <= 1 or (config.init_share and config.init is None):
        raise WadiError(f"--init-share {config.init_share}: must be between 0 and 1, and needs --init")
    if not 0 <= config.recombine <= 1:
        raise WadiError(f"--recombine {config.recombine}: must be between 0 and 1")
    if config.recombine and not architecture.recombines:
        raise WadiError(
            f"--recombine {config.recombine}: only for --architecture unet, whose text encoder reads "
            "from left to right; omit it"
        )
    if config.init is None:
        return
    name, wanted = pipeline_class_name(config.init), architecture.pipeline_class.__name__
    if name != wanted:
        raise WadiError(
            f"--init {config.init}: holds a {name}; --architecture {config.architecture} needs a {wanted}"
        )


def train_teacher(config: TrainTeacherConfig) -> dict[str, float]:
    """Train and write the pipeline folder, with its figures in `FIGURES`.

    Returns:
        ``steps``, ``seconds``, ``loss`` of the last step, and ``denoiser_parameters``.

    Raises:
        WadiError: an option is outside its range or does not fit the others, `init` is of another
            architecture, the checkpoint is of other options, or a folder cannot be read or may not be
            written.
    """
    architecture = ARCHITECTURES[config.architecture]()
    _check(config, architecture)
    inputs = (config.vae, config.init, config.atlas, config.checkpoints)
    output = Output(config.out, "emoji train-teacher", inputs, config.overwrite)
    output.check()
    options = {name: value for name, value in vars(config).items() if name not in FREE}
    options["device"] = torch.device(config.device).type
    checkpoints = TimedCheckpoints(config.checkpoints, config.checkpointing_seconds, options)
    device = prepare_torch(config)
    vae = load_module(AutoencoderKL, config.vae, torch.float32).to(device).requires_grad_(False)
    captions = sample_captions(config.captions, "teacher")
    pool = encode_pool(config, vae, architecture, captions, config.pictures, config.seed)
    pairs = pool
    if config.pair_focus:
        two = [caption for caption in captions if caption.relation is not None]
        pairs = encode_pool(config, vae, architecture, two, config.pictures // 2, config.seed + 2)
    networks = _networks(config, architecture)
    initial = [p.detach().clone() for network in networks.values() for p in network.parameters()]
    training = TeacherTraining(config, architecture, networks)
    steps = _fit(training, pool, pairs, checkpoints)
    for parameter, average, start in zip(training.parameters, training.ema, initial, strict=True):
        parameter.data.copy_(average.lerp(start, config.init_share))
    denoiser = next(iter(networks.values()))
    figures = {"steps": steps.done, "seconds": steps.elapsed, "loss": training.loss.item()}
    figures["denoiser_parameters"] = sum(p.numel() for p in denoiser.parameters())
    pipeline = architecture.pipeline(vae, networks)
    with output.writing() as temporary:
        pipeline.to(torch.float16).save_pretrained(temporary, safe_serialization=True)
        write_json(temporary / FIGURES, {"config": vars(config), "figures": figures})
    return figures


def _fit(
    training: TeacherTraining,
    pool: tuple[torch.Tensor, ...],
    pairs: tuple[torch.Tensor, ...],
    checkpoints: TimedCheckpoints,
) -> TimedSteps:
    config, device, size = training.config, training.device, training.config.train_batch_size
    rate = training.architecture.learning_rate if config.learning_rate is None else config.learning_rate
    tokenizer = training.architecture.tokenizers["tokenizer"]
    recombination = Recombination(tokenizer, device) if config.recombine else None
    generator = torch.Generator(device).manual_seed(config.seed + 1)
    # during the focus, the first half of a batch shows pairs
    lowest = torch.where(torch.arange(size, device=device) < size // 2, FOCUS, 0.0)
    done = checkpoints.restore(training, generator)
    steps = TimedSteps(config.seconds, config.max_train_steps, "teacher", *done)
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
        now = rate * warmup_cosine(step, used, 500)
        training.step(latents.float(), ids, step, now, generator, lowest if focused else 0.0, source)
        steps.show(training.loss)
        checkpoints.save_when_due(training, generator, steps)
    return steps
