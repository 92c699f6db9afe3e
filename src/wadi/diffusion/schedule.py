r"""The noise schedule: the only place that knows alpha, sigma and what a network predicts.

With x0 a clean latent and n ~ N(0, I), a noisy latent is

    x_t = alpha x0 + sigma n

and a network predicts p = a x0 + b n:

| prediction | a | b | alpha and sigma |
| --- | --- | --- | --- |
| epsilon | 0 | 1 | variance preserving: alpha^2 + sigma^2 = 1, from betas |
| v_prediction | -sigma | alpha | the same (arXiv 2202.00512) |
| flow_prediction | -1 | 1 | rectified flow: alpha = 1 - sigma, sigma in [0, 1] (arXiv 2209.03003) |
| sample | 1 | 0 | any |

Two equations with two unknowns, whose determinant is d = b alpha - a sigma:

    x0 = (b x_t - sigma p) / d          n = (alpha p - a x_t) / d

d is alpha for epsilon, exactly 1 for v_prediction and flow_prediction, and -sigma for sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, SchedulerMixin

from wadi.errors import WadiError

SCHEDULE_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
"""Fields of a scheduler's configuration that decide a variance-preserving noise schedule."""

PREDICTIONS = {
    "variance_preserving": ("epsilon", "v_prediction", "sample"),
    "flow": ("flow_prediction", "sample"),
}
"""What networks of each kind of schedule predict, by the names that diffusers' schedulers have."""


def is_flow(scheduler: SchedulerMixin | Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler, or its configuration, is for a rectified flow."""
    config, name = _config_and_name(scheduler)
    # a scheduler's own `config` does not hold the name of its class
    nameless = name == "scheduler" and "shift" in config and "beta_schedule" not in config
    return bool(config.get("use_flow_sigmas")) or name.startswith("FlowMatch") or nameless


def schedule_class(scheduler: SchedulerMixin | Mapping[str, Any]) -> type[Schedule]:
    """Which kind of schedule a diffusers scheduler, or its configuration, has.

    Raises:
        WadiError: neither a schedule of betas nor a rectified flow (EDM, inverted sigmas); the message names
            the scheduler's class.
    """
    config, name = _config_and_name(scheduler)
    if is_flow(scheduler):
        if config.get("invert_sigmas"):
            raise WadiError(
                f"scheduler: {name} with invert_sigmas is not supported; "
                "use a model whose sigma is 1 at pure noise"
            )
        return RectifiedFlow
    betas = config.get("beta_start") is not None or config.get("trained_betas") is not None
    if not betas or "beta_schedule" not in config:
        raise WadiError(
            f"scheduler: {name} is neither a schedule of betas nor a rectified flow; "
            "use a model with one of these"
        )
    return VariancePreserving


def prediction_type(scheduler: SchedulerMixin | Mapping[str, Any]) -> str:
    """What a model with this scheduler predicts, by the names in `PREDICTIONS`.

    The schedulers that know flows alone have no `prediction_type`; it is "flow_prediction" there.

    Raises:
        WadiError: as `schedule_class`.
    """
    usual = schedule_class(scheduler).usual_prediction
    return str(_config_and_name(scheduler)[0].get("prediction_type") or usual)


def _config_and_name(scheduler: SchedulerMixin | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Configuration and class of a scheduler; a configuration that has no class is "scheduler"."""
    if isinstance(scheduler, SchedulerMixin):
        return scheduler.config, type(scheduler).__name__
    return scheduler, str(scheduler.get("_class_name") or "scheduler")


class Schedule(torch.nn.Module, ABC):
    """Noise levels of a diffusion model, in float32, and the formulas of the table above.

    A time t is a tensor (N,), one entry a sample: timesteps (int64) of a variance-preserving schedule, sigmas
    (float32) of a rectified flow. Latents are (N, C, H, W), or of any other shape that begins with N.

    Args:
        prediction_type: what the network predicts; see the table.

    Raises:
        WadiError: networks of this kind of schedule do not predict that.
    """

    kind: str
    usual_prediction: ClassVar[str]
    """What a network predicts where the scheduler does not say it."""

    def __init__(self, prediction_type: str) -> None:
        super().__init__()
        if prediction_type not in PREDICTIONS[self.kind]:
            raise WadiError(
                f"scheduler: prediction_type {prediction_type!r} is not supported; "
                f"use a model that predicts one of {', '.join(PREDICTIONS[self.kind])}"
            )
        self.prediction_type = prediction_type

    @staticmethod
    def from_config(
        scheduler: SchedulerMixin | Mapping[str, Any], image_tokens: int | None = None
    ) -> Schedule:
        """Read any diffusers scheduler, or its configuration.

        Args:
            scheduler: one with betas, or a rectified flow (`FlowMatchEulerDiscreteScheduler` and its
                relatives, or a solver with `use_flow_sigmas`).
            image_tokens: tokens of an image of the trained size, which decide a dynamic shift.

        Raises:
            WadiError: another kind of noise schedule, named by its class (EDM, inverted sigmas).
        """
        config, _ = _config_and_name(scheduler)
        if schedule_class(scheduler) is RectifiedFlow:
            return RectifiedFlow.from_config(config, image_tokens)
        betas = {key: config[key] for key in SCHEDULE_FIELDS if key in config}
        return VariancePreserving(DDPMScheduler(**betas).alphas_cumprod, prediction_type(scheduler))

    @property
    @abstractmethod
    def last(self) -> torch.Tensor:
        """The time of pure noise, 0-dimensional."""

    @abstractmethod
    def levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma at the times t (N,), each (N, 1, 1, 1)."""

    @abstractmethod
    def times(self, fraction: torch.Tensor) -> torch.Tensor:
        """The times at fractions in [0, 1] of the whole range, as the model was trained to see them."""

    @abstractmethod
    def sample_t(self, n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
        """Draw n times between the fractions `low` and `high` of the range, on the generator's device."""

    @abstractmethod
    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """What diffusers' pipelines tell a network at the times t: timesteps from 0 to 999 or 1000."""

    def ending_at(self, alpha_T_squared: float | None) -> Schedule:
        """The schedule of a one-step student: this one, with another alpha_T^2 at the end where it has one.

        Raises:
            WadiError: a flow has no alpha_T to choose, or as for `VariancePreserving.ending_at`.
        """
        if alpha_T_squared is not None:
            raise WadiError(
                "--alpha-T-squared: this teacher is a rectified flow, whose last alpha is 0; omit the option"
            )
        return self

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = alpha x0 + sigma n."""
        alpha, sigma = self.levels(t)
        return alpha * x0 + sigma * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should predict at x_t: p = a x0 + b n."""
        alpha, sigma = self.levels(t)
        a, b, _ = self._coefficients(alpha, sigma)
        return a * x0 + b * noise

    def x0(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The clean latent that a prediction at (x_t, t) stands for, float32: (b x_t - sigma p) / d.

        Half precision would not do: at much noise an epsilon is amplified by 1 / alpha (14.6 for SD 1.5).
        """
        alpha, sigma = self.levels(t)
        _, b, d = self._coefficients(alpha, sigma)
        return _divided(b * x_t.float() - sigma * prediction.float(), d)

    def noise(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The noise that a prediction at (x_t, t) stands for, float32: (alpha p - a x_t) / d."""
        if self.prediction_type == "epsilon":
            return prediction.float()
        alpha, sigma = self.levels(t)
        a, _, d = self._coefficients(alpha, sigma)
        return _divided(alpha * prediction.float() - a * x_t.float(), d)

    def _coefficients(self, alpha: torch.Tensor, sigma: torch.Tensor) -> tuple[Any, Any, Any]:
        """a, b and d of the table; d is None where it is exactly 1."""
        return {
            "epsilon": (0.0, 1.0, alpha),
            "v_prediction": (-sigma, alpha, None),
            "flow_prediction": (-1.0, 1.0, None),
            "sample": (1.0, 0.0, -sigma),
        }[self.prediction_type]


class VariancePreserving(Schedule):
    """Discrete timesteps 0 .. T with alpha_t^2 = prod_{s <= t} (1 - beta_s) and sigma_t^2 = 1 - alpha_t^2.

    Args:
        alphas_cumprod: float tensor (T + 1,), alpha_t^2.
        prediction_type: "epsilon", "v_prediction" or "sample".
    """

    kind, usual_prediction = "variance_preserving", "epsilon"
    alphas: torch.Tensor
    sigmas: torch.Tensor

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str) -> None:
        super().__init__(prediction_type)
        alphas_cumprod = alphas_cumprod.float()
        self.register_buffer("alphas", alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("sigmas", (1 - alphas_cumprod).sqrt(), persistent=False)

    def ending_at(self, alpha_T_squared: float | None) -> VariancePreserving:
        """This schedule with another alpha_T^2 at the last timestep, as a one-step student may have it.

        Raises:
            WadiError: alpha_T is zero, and an epsilon prediction then says nothing of x0.
        """
        squared = self.alphas.double().square()
        if alpha_T_squared is not None:
            squared[-1] = alpha_T_squared
        if self.prediction_type == "epsilon" and squared[-1] <= 0:
            raise WadiError(
                "scheduler: alpha_T is zero (zero terminal SNR), so an epsilon prediction cannot give x0 in "
                "one step; set --alpha-T-squared to a small positive number, or use a v_prediction teacher"
            )
        own = VariancePreserving(squared, self.prediction_type).to(self.alphas.device)
        own.alphas[:-1], own.sigmas[:-1] = self.alphas[:-1], self.sigmas[:-1]
        if alpha_T_squared is None:
            own.alphas[-1], own.sigmas[-1] = self.alphas[-1], self.sigmas[-1]
        return own

    @property
    def last(self) -> torch.Tensor:
        """See `Schedule.last`: T."""
        return torch.full((), len(self.alphas) - 1, device=self.alphas.device)

    def levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Schedule.levels`."""
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def times(self, fraction: torch.Tensor) -> torch.Tensor:
        """See `Schedule.times`: the nearest timestep."""
        count = len(self.alphas)
        return (fraction * count).round().long().clamp(max=count - 1)

    def sample_t(self, n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
        """See `Schedule.sample_t`: uniform over the timesteps, both ends included."""
        first, last = (int(self.times(torch.tensor(f, dtype=torch.float64))) for f in (low, high))
        return torch.randint(first, last + 1, (n,), generator=generator, device=generator.device)

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """See `Schedule.timestep`: t itself."""
        return t


class RectifiedFlow(Schedule):
    """A rectified flow: alpha = 1 - sigma, and the time is sigma itself, in [0, 1].

    Args:
        shift: the model's training and sampling put more times at much noise:
            sigma = shift u / (1 + (shift - 1) u) for u uniform in [0, 1].
        prediction_type: "flow_prediction" (v = n - x0) or "sample".
        num_train_timesteps: what the network is told is num_train_timesteps times sigma.
    """

    kind, usual_prediction = "flow", "flow_prediction"
    shift: torch.Tensor

    def __init__(
        self,
        shift: float = 1.0,
        prediction_type: str = "flow_prediction",
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__(prediction_type)
        if not shift > 0:
            raise WadiError(f"scheduler: shift {shift} of a rectified flow must be positive")
        self.num_train_timesteps = num_train_timesteps
        self.register_buffer("shift", torch.tensor(float(shift)), persistent=False)

    @classmethod
    def from_config(cls, scheduler: Mapping[str, Any], image_tokens: int | None = None) -> RectifiedFlow:
        """Read the configuration of a flow scheduler; see `Schedule.from_config`.

        A dynamic shift is exp(mu), or mu where its type is "linear", with mu linear in the number of tokens
        (FLUX.1). `shift_terminal` stretches the times of a sampler only, and changes nothing here.
        """
        predicted = prediction_type(scheduler)
        steps = int(scheduler.get("num_train_timesteps", 1000))
        if not scheduler.get("use_dynamic_shifting"):
            shift = scheduler.get("shift", scheduler.get("flow_shift", 1.0))
            return cls(float(shift), predicted, steps)
        if image_tokens is None:
            raise WadiError("scheduler: a dynamic shift depends on the image's size; name the size")
        low, high = float(scheduler["base_shift"]), float(scheduler["max_shift"])
        fewest, most = int(scheduler["base_image_seq_len"]), int(scheduler["max_image_seq_len"])
        mu = low + (high - low) * (image_tokens - fewest) / (most - fewest)
        linear = scheduler.get("time_shift_type", "exponential") == "linear"
        return cls(mu if linear else math.exp(mu), predicted, steps)

    @property
    def last(self) -> torch.Tensor:
        """See `Schedule.last`: 1."""
        return torch.ones_like(self.shift)

    def levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Schedule.levels`."""
        sigma = t.float().view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def times(self, fraction: torch.Tensor) -> torch.Tensor:
        """See `Schedule.times`: shifted."""
        return self.shift * fraction / (1 + (self.shift - 1) * fraction)

    def sample_t(self, n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
        """See `Schedule.sample_t`: uniform before the shift."""
        u = torch.rand(n, generator=generator, device=generator.device)
        return self.times(low + (high - low) * u)

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """See `Schedule.timestep`: num_train_timesteps sigma."""
        return self.num_train_timesteps * t


def _divided(value: torch.Tensor, d: torch.Tensor | None) -> torch.Tensor:
    return value if d is None else value / d
