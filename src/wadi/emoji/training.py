"""What the trainings of the emoji world share: options, encoded scenes, and one update on noisy latents."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SchedulerMixin

from wadi.diffusion import Schedule
from wadi.distill.update import Average
from wadi.emoji.captions import Caption, stated
from wadi.emoji.glyphs import load_atlas
from wadi.emoji.scenes import Scenes, random_scenes, render
from wadi.graph import record
from wadi.progress import progress

ENCODED_BATCH = 2000
"""Images that are encoded at a time before a training starts."""


@dataclass(kw_only=True)
class TrainOptions:
    """Options of every training of the emoji world."""

    atlas: Path | None = None
    """Atlas file of `wadi emoji atlas`; if it is not given, the emoji are drawn from the font."""
    max_train_steps: int = 1_000_000
    """Stop after this many steps even if time is left."""
    seed: int = 0
    """Seed of everything that is random."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on, such as cpu or cuda:1."""
    overwrite: bool = False
    """Replace the output folder if this command wrote it and nothing else is in it."""


def prepare_torch(config: TrainOptions) -> torch.device:
    """Seed torch, allow its faster kernels, and return the device of the options."""
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return torch.device(config.device)


@torch.no_grad()
def encoded_scenes(
    config: TrainOptions, vae: AutoencoderKL, captions: Sequence[Caption], count: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Scenes, torch.Tensor]]:
    """Draw and encode scenes of captions that are chosen at random, a batch at a time.

    Args:
        config: names the atlas and the device.
        vae: encodes the images, on the device.
        captions: the captions to choose from.
        count: number of scenes, rounded up to whole batches.
        seed: seed of the choice and of the scenes.

    Yields:
        Latents (N, 4, 16, 16) bfloat16 as the denoiser has them, the index of each caption (N,) int64, the
        scenes, and their images (N, 3, 64, 64) in [0, 1]; all on the device.
    """
    device, size = torch.device(config.device), min(ENCODED_BATCH, count)
    atlas, columns = load_atlas(config.atlas).to(device), stated(captions, device)
    generator = torch.Generator(device).manual_seed(seed)
    for _ in progress(range(math.ceil(count / size)), desc="images", unit="batch"):
        scenes, index = random_scenes(columns, size, generator)
        images = render(scenes, atlas)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = vae.encode(2 * images - 1).latent_dist.mean
        yield (latents * vae.config.scaling_factor).bfloat16(), index, scenes, images


def joined(parts: Iterable[Sequence[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Batches of several tensors as one tensor for each place."""
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class AveragedAdamW:
    """AdamW with a moving average of the weights, which is the result; nothing in it waits for the device.

    Args:
        parameters: what is trained, all on `device`.
        ema_decay: decay of the average; it starts lower, see `wadi.distill.update.Average`.
        device: device of the parameters.

    Attributes:
        parameters: the parameters as a list.
        ema: their averages, in the same order.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], ema_decay: float, device: torch.device):
        self.parameters = list(parameters)
        self.average = Average({str(i): p for i, p in enumerate(self.parameters)}, ema_decay)
        self.ema = list(self.average.tensors.values())
        self.learning_rate = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.learning_rate,
            weight_decay=1e-3,
            betas=(0.9, 0.99),
            capturable=device.type == "cuda",
            fused=True,
        )

    def prepare(self, step: int, rate: float) -> None:
        """Set the learning rate, and the weight of the average at this step."""
        self.learning_rate.fill_(rate)
        self.average.set_step(step)

    def __call__(self, loss: torch.Tensor) -> None:
        """Compute gradients, clip them to norm 1, update the weights and their average."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.parameters if p.grad is not None], 1.0, foreach=True
        )
        # where the gradient is not finite, fused AdamW's own mask leaves everything as it was without waiting
        self.optimizer.found_inf = norm.isfinite().logical_not().float()
        self.optimizer.step()
        self.average.follow(norm.isfinite())

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """The live tensors of a checkpoint: weights, their averages, and AdamW's moments."""
        state = self.optimizer.state
        return {
            "weights": {str(i): p.data for i, p in enumerate(self.parameters)},
            "ema": self.average.tensors,
            "optimizer": {
                f"{i}.{key}": x for i, p in enumerate(self.parameters) for key, x in state[p].items()
            },
        }


class LatentTraining(ABC):
    """One training step on noisy latents, recorded as a CUDA graph where there is a GPU.

    The loss is the mean of w_t |p(x_t, t, c) - target|^2 in float32, where the target is what the schedule
    says: the noise n, or v = n - x0 of a flow. A subclass says how it is predicted (`predict`), at which
    levels of noise (`fractions`) and what w_t is (`weighted`), and calls `start` when its tensors are there.

    Args:
        config: options of the training; `train_batch_size` and `ema_decay` among them.
        parameters: what is trained.
        scheduler: scheduler of the model, which says what it predicts.
        empty: (1, L) int64, tokens of the empty prompt.
        shape: (C, H, W) of the latents.
        variants: V, captions for each latent.
    """

    def __init__(
        self,
        config: TrainOptions,
        parameters: Iterable[torch.nn.Parameter],
        scheduler: SchedulerMixin,
        empty: torch.Tensor,
        shape: tuple[int, int, int] = (4, 16, 16),
        variants: int = 1,
    ) -> None:
        self.config, self.device = config, torch.device(config.device)
        self.update = AveragedAdamW(parameters, config.ema_decay, self.device)
        self.parameters, self.ema = self.update.parameters, self.update.ema
        self.schedule = Schedule.from_config(scheduler).to(self.device)
        size = config.train_batch_size
        self.latents = torch.zeros(size, *shape, device=self.device)
        self.noise = torch.zeros_like(self.latents)
        self.times = self.schedule.last.repeat(size)
        self.empty = empty.to(self.device)
        self.ids = self.empty.repeat(size, variants, 1)
        self.loss = torch.zeros((), device=self.device)

    def start(self) -> None:
        """Record the step; the runs before the recording change nothing, as the learning rate is zero."""
        self.run = record(self._step)[0].replay if self.device.type == "cuda" else self._step

    def make_moments(self) -> None:
        """Make AdamW's moments, which its first step would make, so that a checkpoint can fill them."""
        if not self.update.optimizer.state:
            self._step()

    @abstractmethod
    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Predict the schedule's target at `noisy` (N, C, H, W) for the captions `ids`.

        The network is told `timesteps` (N,).
        """

    def fractions(self, generator: torch.Generator) -> torch.Tensor:
        """Draw where in the range of the noise each sample is, (N,) in [0, 1): uniform by default."""
        return torch.rand(len(self.times), generator=generator, device=self.device)

    def weighted(self, error: torch.Tensor) -> torch.Tensor:
        """Multiply the squared errors (N, C, H, W) by w_t, which is 1 unless a subclass says otherwise."""
        return error

    def _step(self) -> None:
        noisy = self.schedule.add_noise(self.latents, self.noise, self.times)
        target = self.schedule.target(self.latents, self.noise, self.times)
        on_gpu = self.device.type == "cuda"
        # cache_enabled: a recorded graph must not keep casts of weights from an earlier step
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            prediction = self.predict(noisy, self.schedule.timestep(self.times))
        loss = self.weighted((prediction.float() - target).square()).mean()
        self.update(loss)
        self.loss.copy_(loss.detach())

    def step(
        self,
        latents: torch.Tensor,
        ids: torch.Tensor,
        step: int,
        rate: float,
        generator: torch.Generator,
        lowest: torch.Tensor | float = 0.0,
    ) -> None:
        """Draw levels of noise and noise, replace a tenth of the captions by the empty prompt, and update.

        Args:
            latents: (N, C, H, W) float32.
            ids: (N, V, L) int64, tokens of V captions for each latent.
            step: number of the steps before this one.
            rate: the learning rate.
            generator: source of the randomness, on the device.
            lowest: lowest level that is drawn, as a fraction of the range; one for all or (N,).
        """
        size = len(latents)
        fractions = self.fractions(generator)
        self.latents.copy_(latents)
        self.noise.copy_(torch.randn(latents.shape, generator=generator, device=self.device))
        self.times.copy_(self.schedule.times(lowest + (1 - lowest) * fractions))
        omitted = torch.rand(size, 1, 1, generator=generator, device=self.device) < 0.1
        self.ids.copy_(torch.where(omitted, self.empty, ids))
        self.update.prepare(step, rate)
        self.run()
