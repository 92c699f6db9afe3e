"""`wadi emoji train-vae`: the AutoencoderKL of the emoji world, on endless scenes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from wadi.emoji.captions import sample_captions, stated
from wadi.emoji.clock import TimedSteps, warmup_cosine
from wadi.emoji.glyphs import load_atlas
from wadi.emoji.scenes import random_scenes, render
from wadi.emoji.training import TrainOptions, prepare_torch
from wadi.onestep.components import load_module
from wadi.outputs import Output

MEASURED_BATCH = 256
"""Images in a batch when the latents and the error are measured."""


@dataclass
class TrainVAEConfig(TrainOptions):
    """Train the autoencoder of the emoji world (64 x 64 pixels to 16 x 16 x 4 latents)."""

    out: Path
    """AutoencoderKL folder to write."""
    init: Path | None = None
    """AutoencoderKL folder whose weights the training starts from; random weights if not given."""
    decoder_only: bool = False
    """Train the decoder only: the latents stay as they are, and a teacher of these latents stays good."""
    seconds: float = 200.0
    """Training time."""
    train_batch_size: int = 256
    """Images in each step."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW; it falls to zero along a cosine of the time used."""
    kl_weight: float = 2e-4
    """Weight of the Kullback-Leibler term, which is a mean over latent elements."""


def new_vae() -> AutoencoderKL:
    """An autoencoder with random weights: 2.7 M parameters, factor 4, 4 latent channels."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=1.0,
    )


def reconstruction_loss(output: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 + L2 + half the L1 of gradients (edges) + half the L1 of a low-pass (flat colours)."""
    error = output - images
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return (
        error.abs().mean() + error.square().mean() + 0.5 * edges + 0.5 * F.avg_pool2d(error, 8).abs().mean()
    )


def train_vae(config: TrainVAEConfig) -> dict[str, float]:
    """Train, standardise the latents, write the folder.

    Returns:
        ``psnr``, the peak signal-to-noise ratio of the reconstructions in decibels.
    """
    output = Output(config.out, "emoji train-vae", (config.init, config.atlas), config.overwrite)
    output.check()
    device = prepare_torch(config)
    vae = new_vae() if config.init is None else load_module(AutoencoderKL, config.init, torch.float32)
    vae, atlas = vae.to(device), load_atlas(config.atlas).to(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    columns = stated(sample_captions(100_000, "vae"), device)

    def images(count: int) -> torch.Tensor:
        return 2 * render(random_scenes(columns, count, generator)[0], atlas) - 1

    _fit(config, vae, images)
    vae.eval().requires_grad_(False)
    if not config.decoder_only:
        batches = (images(MEASURED_BATCH) for _ in range(40))
        standardise_latents(vae, torch.cat([vae.encode(batch).latent_dist.mean for batch in batches]))
    error = torch.stack([_squared_error(vae, images(MEASURED_BATCH)) for _ in range(8)])
    with output.writing() as folder:
        vae.half().save_pretrained(folder)
    # the images are in [-1, 1], so the peak is 2
    return {"psnr": 10 * math.log10(4 / error.mean().item())}


def _fit(config: TrainVAEConfig, vae: AutoencoderKL, images: Callable[[int], torch.Tensor]) -> None:
    if config.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=1e-4, betas=(0.9, 0.99))
    steps = TimedSteps(config.seconds, config.max_train_steps, "vae")
    for step, used in steps:
        optimizer.param_groups[0]["lr"] = config.learning_rate * warmup_cosine(step, used, 200)
        batch = images(config.train_batch_size)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample
        latent_elements = posterior.mean[0].numel()  # diffusers sums the term over them
        loss = (
            reconstruction_loss(output.float(), batch)
            + config.kl_weight * posterior.kl().float().mean() / latent_elements
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        steps.show(loss)


def _squared_error(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return (vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1) - images).square().mean()


def standardise_latents(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Fold mean and standard deviation of each latent channel into the 1 x 1 convolutions around the latents.

    Afterwards the latents of real images have mean 0 and variance 1, and the images are the same.

    Args:
        vae: changed in place.
        latents: (N, 4, h, w), means of the posterior.
    """
    mean = latents.mean((0, 2, 3))
    std = latents.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    # The first half of quant_conv's output is the mean, the second the log-variance.
    quant.bias[:channels] -= mean
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] /= std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
