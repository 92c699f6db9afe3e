"""The noise schedule: the only place that knows alpha_t, sigma_t and what a network predicts.

With x_0 a clean latent and n ~ N(0, I):

    x_t = alpha_t x_0 + sigma_t n           alpha_t^2 = prod_{s <= t} (1 - beta_s), sigma_t^2 = 1 - alpha_t^2
    v_t = alpha_t n - sigma_t x_0
    x_0 = (x_t - sigma_t epsilon) / alpha_t = alpha_t x_t - sigma_t v
    epsilon = sigma_t x_t + alpha_t v
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin

from wadi.errors import WadiError
from wadi.onestep.scheduler import SCHEDULE_FIELDS, one_step_x0

PREDICTION_TYPES = ("epsilon", "v_prediction")


class Schedule(torch.nn.Module):
    """Noise levels of a variance-preserving diffusion model with discrete timesteps 0 .. T, all in float32.

    Args:
        alphas_cumprod: float tensor (T + 1,), alpha_t^2.
        prediction_type: what the network predicts, "epsilon" or "v_prediction".
        alpha_T_squared: the value of alpha_T^2 that the one-step student is trained with, if it is not the
            schedule's own; the teacher's and the fake model's noise levels stay the schedule's.

    Raises:
        WadiError: unsupported prediction type, or alpha_T = 0 where the one-step formula divides by it.
    """

    alphas: torch.Tensor
    sigmas: torch.Tensor
    alpha_T: torch.Tensor  # noqa: N815
    sigma_T: torch.Tensor  # noqa: N815

    def __init__(
        self, alphas_cumprod: torch.Tensor, prediction_type: str, alpha_T_squared: float | None = None
    ) -> None:
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise WadiError(
                f"scheduler: prediction_type {prediction_type!r} is not supported; "
                f"use a model that predicts one of {', '.join(PREDICTION_TYPES)}"
            )
        alphas_cumprod = alphas_cumprod.float()
        last = alphas_cumprod[-1] if alpha_T_squared is None else torch.tensor(alpha_T_squared).float()
        if prediction_type == "epsilon" and last <= 0:
            raise WadiError(
                "scheduler: alpha_T is zero, so an epsilon prediction cannot give x0 in one step; "
                "set --alpha-T-squared to a small positive number"
            )
        self.prediction_type = prediction_type
        self.register_buffer("alphas", alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("sigmas", (1 - alphas_cumprod).sqrt(), persistent=False)
        self.register_buffer("alpha_T", last.sqrt(), persistent=False)
        self.register_buffer("sigma_T", (1 - last).sqrt(), persistent=False)

    @classmethod
    def from_config(
        cls, scheduler: SchedulerMixin | Mapping[str, Any], alpha_T_squared: float | None = None
    ) -> Schedule:
        """Read any diffusers scheduler, or its config, that is described by betas.

        Raises:
            WadiError: the scheduler has no betas (flow matching, EDM), or as for the class.
        """
        config = scheduler.config if isinstance(scheduler, SchedulerMixin) else scheduler
        if "beta_schedule" not in config:
            name = config.get("_class_name", "this scheduler")
            raise WadiError(f"scheduler: {name} has no betas; use a model with a DDPM-like noise schedule")
        betas = {key: config[key] for key in SCHEDULE_FIELDS if key in config}
        return cls(
            DDPMScheduler(**betas).alphas_cumprod, config.get("prediction_type", "epsilon"), alpha_T_squared
        )

    @property
    def num_train_timesteps(self) -> int:
        """T + 1, the number of noise levels."""
        return len(self.alphas)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """alpha_t for timesteps (N,), shaped (N, 1, 1, 1)."""
        return self.alphas[t].view(-1, 1, 1, 1)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """sigma_t for timesteps (N,), shaped (N, 1, 1, 1)."""
        return self.sigmas[t].view(-1, 1, 1, 1)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = alpha_t x_0 + sigma_t n, for (N, C, H, W) latents and timesteps (N,)."""
        return self.alpha(t) * x0 + self.sigma(t) * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should predict at x_t = alpha_t x_0 + sigma_t n: n, or v_t."""
        if self.prediction_type == "epsilon":
            return noise
        return self.alpha(t) * noise - self.sigma(t) * x0

    def epsilon(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The noise that a network's prediction at (x_t, t) stands for."""
        if self.prediction_type == "epsilon":
            return prediction
        return self.sigma(t) * x_t + self.alpha(t) * prediction

    def x0(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The clean latent that a network's prediction at (x_t, t) stands for."""
        if self.prediction_type == "epsilon":
            return (x_t - self.sigma(t) * prediction) / self.alpha(t)
        return self.alpha(t) * x_t - self.sigma(t) * prediction

    def one_step(self, prediction: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The student's picture: x_0 from its prediction at the last timestep on z ~ N(0, I), in float32.

        Half precision would not do: epsilon is amplified by 1/alpha_T (14.6 for Stable Diffusion).
        """
        return one_step_x0(prediction, z, self.alpha_T, self.sigma_T, self.prediction_type)
