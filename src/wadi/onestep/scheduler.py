"""One step as a configuration of a stock diffusers scheduler, no fork of anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LCMScheduler, SchedulerMixin

from wadi.diffusion.schedule import SCHEDULE_FIELDS
from wadi.errors import WadiError


def one_step_scheduler(
    scheduler: SchedulerMixin | Mapping[str, Any], alpha_T_squared: float | None = None
) -> LCMScheduler:
    r"""Configure diffusers' `LCMScheduler` to be exactly one step from pure noise to the picture.

    With ``num_inference_steps=1`` its ``step`` is, at T = ``num_train_timesteps - 1`` (WaDi,
    arXiv 2603.08258),

        epsilon:       x0 = (z - sigma_T eps) / alpha_T
        v_prediction:  x0 = alpha_T z - sigma_T v

    The result is a stock object: saved in a pipeline folder, it works where wadi is not installed. More than
    one step is refused by `set_timesteps`.

        scheduler = one_step_scheduler(pipeline.scheduler)
        scheduler.set_timesteps(1)
        x0 = scheduler.step(unet(z, scheduler.timesteps[0], c).sample, scheduler.timesteps[0], z).prev_sample

    Args:
        scheduler: the teacher's scheduler or its config; any diffusers scheduler with a beta schedule.
        alpha_T_squared: the student's own alpha_T^2 in (0, 1), where it was trained with another value than
            the teacher's schedule has. ``None`` keeps the schedule's.

    Raises:
        WadiError: the prediction type is neither epsilon nor v_prediction, the schedule has no betas, or
            `alpha_T_squared` is out of range.
    """
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    _check_betas(scheduler, config)
    predicted = prediction_type(scheduler)
    if predicted not in ("epsilon", "v_prediction"):
        raise WadiError(
            f"scheduler: prediction_type {predicted!r} cannot be distilled; "
            "use a teacher with 'epsilon' or 'v_prediction'"
        )
    one_step = _lcm({name: config[name] for name in SCHEDULE_FIELDS if name in config}, predicted)
    own = float(one_step.alphas_cumprod[-1])
    if alpha_T_squared is not None and not math.isclose(alpha_T_squared, own, rel_tol=1e-6):
        betas = _betas_ending_at(alpha_T_squared, len(one_step.alphas_cumprod))
        one_step = _lcm({"num_train_timesteps": len(betas), "trained_betas": betas}, predicted)
        own = float(one_step.alphas_cumprod[-1])
    if predicted == "epsilon" and own <= 0:
        raise WadiError(
            "scheduler: alpha_T is zero (zero terminal SNR), so epsilon says nothing about the picture at T; "
            "use a v_prediction teacher or set alpha_T_squared"
        )
    return one_step


def _check_betas(scheduler: SchedulerMixin | Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Flow matching and EDM have none, and `LCMScheduler` would put its default betas there."""
    kind = scheduler.get("_class_name") if isinstance(scheduler, Mapping) else type(scheduler).__name__
    flow = config.get("use_flow_sigmas")
    if flow or (config.get("beta_start") is None and config.get("trained_betas") is None):
        raise WadiError(
            f"scheduler: {kind or 'this scheduler'} {'samples a flow' if flow else 'has no betas'}, and "
            "has no one-step form; use a teacher with a DDPM-like noise schedule"
        )


def prediction_type(scheduler: SchedulerMixin | Mapping[str, Any]) -> str:
    """What a model with this scheduler predicts, such as "epsilon", which is also diffusers' default."""
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    return config.get("prediction_type", "epsilon")


def _lcm(schedule: dict[str, Any], prediction_type: str) -> LCMScheduler:
    try:
        return LCMScheduler(
            **schedule,
            prediction_type=prediction_type,
            original_inference_steps=1,  # the only timestep is then num_train_timesteps - 1, whatever that is
            timestep_scaling=1e6,  # in float32 c_out is 1 and c_skip z vanishes: no boundary condition
            clip_sample=False,
            steps_offset=1,  # unused here; StableDiffusionPipeline rewrites any other value with a warning
        )
    except (NotImplementedError, TypeError) as error:
        raise WadiError(f"scheduler: no one-step form of this noise schedule: {error}") from error


def _betas_ending_at(alpha_T_squared: float, length: int) -> list[float]:
    """Zeros, halves and a rest whose product of (1 - beta) is `alpha_T_squared` to float32 rounding.

    One big last beta would lose digits in 1 - beta; halvings are exact.
    """
    if not 0 < alpha_T_squared < 1:
        raise WadiError(
            f"alpha_T_squared: {alpha_T_squared} is not between 0 and 1 (Stable Diffusion's is 0.0047)"
        )
    halvings = math.floor(-math.log2(alpha_T_squared))
    rest = 1.0 - alpha_T_squared * 2.0**halvings
    if halvings + 1 > length:
        raise WadiError(f"alpha_T_squared: {alpha_T_squared} is too small for {length} training timesteps")
    return [0.0] * (length - halvings - 1) + [0.5] * halvings + [rest]


class Float32Step(LCMScheduler):
    """The one-step scheduler with x0 formed in float32 and rounded to the sample's dtype last.

    1 / alpha_T is about 15: in half precision it would multiply the rounding of epsilon by as much. In
    float32 it is the stock scheduler bit for bit. Used at run time only, never saved.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Do `LCMScheduler.step` in float32; shapes, arguments and result as there."""
        output = super().step(model_output.float(), timestep, sample.float(), generator, return_dict=True)
        output.prev_sample = output.prev_sample.to(sample.dtype)
        output.denoised = output.denoised.to(sample.dtype)
        return output if return_dict else (output.prev_sample, output.denoised)
