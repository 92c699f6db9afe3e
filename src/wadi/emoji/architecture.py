"""What differs between the teachers of the emoji world: networks, text, and the schedule of the noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SchedulerMixin
from transformers import PreTrainedTokenizerBase

Networks = dict[str, torch.nn.Module]
"""Networks by their name in the pipeline."""


class Architecture(ABC):
    """One kind of teacher.

    Attributes:
        tokenizers: by their name in the pipeline.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    """Class of the written pipeline."""
    networks: ClassVar[dict[str, type[torch.nn.Module]]]
    """Classes of the trained networks by their name in the pipeline, the denoiser first."""
    learning_rate: ClassVar[float]
    """Highest learning rate."""
    absent: ClassVar[tuple[str, ...]] = ()
    """Parts of the pipeline that are None."""
    recombines: ClassVar[bool] = False
    """Whether `wadi.emoji.recombine` works: only where the text encoder reads from left to right."""
    tokenizers: dict[str, PreTrainedTokenizerBase]

    @abstractmethod
    def new(self) -> Networks:
        """The trained networks with random weights, on the CPU."""

    @abstractmethod
    def tokens(self, prompts: list[str]) -> torch.Tensor:
        """Tokens (N, L) int64 of N prompts, those of several tokenizers side by side."""

    @abstractmethod
    def predict(
        self,
        networks: Networks,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        ids: torch.Tensor,
        source: torch.Tensor,
    ) -> torch.Tensor:
        """Predict as the stock pipeline does, without guidance; a CUDA graph can hold it.

        Args:
            networks: the trained networks; the denoiser may be compiled.
            noisy: latents (N, 4, 16, 16).
            timesteps: (N,), what the denoiser is told.
            ids: (N, V, L) int64, tokens of V captions for each latent; V is 1 unless `recombines`.
            source: (N, L) int64, the caption that lends the state of each token.

        Returns:
            (N, 4, 16, 16).
        """

    def scheduler(self) -> SchedulerMixin:
        """Stable Diffusion's noise schedule, sampled by DDIM from the last timestep on.

        PixArt's transformer has it too. PixArt's own linear schedule ends at alpha_T^2 = 4.0e-5, where one
        step would magnify errors of epsilon 157 times instead of 15 times.
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

    def fractions(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw where in the range of the noise each sample is trained: (N,) in [0, 1), uniform."""
        return torch.rand(count, generator=generator, device=generator.device)

    def pipeline(self, vae: AutoencoderKL, networks: Networks) -> DiffusionPipeline:
        """The stock pipeline of trained networks."""
        parts: dict[str, Any] = {**networks, **self.tokenizers, **dict.fromkeys(self.absent)}
        if "safety_checker" in parts:
            parts["requires_safety_checker"] = False
        return self.pipeline_class(vae=vae, scheduler=self.scheduler(), **parts)
