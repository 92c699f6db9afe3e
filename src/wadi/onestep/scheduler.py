"""One step as a configuration of a stock diffusers scheduler, no fork of anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, SchedulerMixin

from wadi.diffusion.schedule import (
    PREDICTIONS,
    SCHEDULE_FIELDS,
    RectifiedFlow,
    prediction_type,
    schedule_class,
)
from wadi.errors import WadiError


def one_step_scheduler(
    scheduler: SchedulerMixin | Mapping[str, Any], alpha_T_squared: float | None = None
) -> SchedulerMixin:
    r"""Configure a stock scheduler of diffusers to be exactly one step from pure noise to the image.

    With ``num_inference_steps=1`` its ``step`` is, at T = ``num_train_timesteps - 1`` of a schedule of betas
    (WaDi, arXiv 2603.08258), and at sigma = 1 of a rectified flow,

        epsilon:          x0 = (z - sigma_T eps) / alpha_T
        v_prediction:     x0 = alpha_T z - sigma_T v
        flow_prediction:  x0 = z - v

    The first two are an `LCMScheduler`, which refuses more than one step in `set_timesteps`. The third is a
    `FlowMatchEulerDiscreteScheduler` without any shift. Saved in a pipeline folder, they work where wadi is
    not installed.

        scheduler = one_step_scheduler(pipeline.scheduler)
        scheduler.set_timesteps(1)
        x0 = scheduler.step(unet(z, scheduler.timesteps[0], c).sample, scheduler.timesteps[0], z).prev_sample

    Args:
        scheduler: the teacher's scheduler or its config; any diffusers scheduler with a beta schedule or of a
            rectified flow.
        alpha_T_squared: the student's own alpha_T^2 in (0, 1), where it was trained with another value than
            the teacher's schedule has. ``None`` keeps the schedule's; a flow takes nothing else.

    Raises:
        WadiError: what the model predicts has no one-step form, the noise schedule is of another kind, or
            `alpha_T_squared` is out of range or given for a flow.
    """
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    kind, predicted = schedule_class(scheduler), prediction_type(scheduler)
    possible = [name for name in PREDICTIONS[kind.kind] if name != "sample"]
    if predicted not in possible:
        raise WadiError(
            f"scheduler: prediction_type {predicted!r} cannot be distilled; "
            f"use a teacher with {' or '.join(map(repr, possible))}"
        )
    if kind is RectifiedFlow:
        if alpha_T_squared is not None:
            raise WadiError(
                f"--alpha-T-squared {alpha_T_squared}: the model is a rectified flow, whose last alpha is 0; "
                "omit it (None)"
            )
        return FlowMatchEulerDiscreteScheduler(config.get("num_train_timesteps", 1000), shift=1.0)
    one_step = _lcm({name: config[name] for name in SCHEDULE_FIELDS if name in config}, predicted)
    own = float(one_step.alphas_cumprod[-1])
    if alpha_T_squared is not None and not math.isclose(alpha_T_squared, own, rel_tol=1e-6):
        betas = _betas_ending_at(alpha_T_squared, len(one_step.alphas_cumprod))
        one_step = _lcm({"num_train_timesteps": len(betas), "trained_betas": betas}, predicted)
        own = float(one_step.alphas_cumprod[-1])
    if predicted == "epsilon" and own <= 0:
        raise WadiError(
            "scheduler: alpha_T is zero (zero terminal SNR), so epsilon says nothing about the image at T; "
            "use a v_prediction teacher or set --alpha-T-squared"
        )
    return one_step


def last_alpha_squared(scheduler: SchedulerMixin | Mapping[str, Any]) -> float | None:
    """alpha_T^2 of one step of a model with this scheduler; ``None`` for a flow, which has none to choose.

    Raises:
        WadiError: as `one_step_scheduler`.
    """
    one_step = one_step_scheduler(scheduler)
    return float(one_step.alphas_cumprod[-1]) if isinstance(one_step, LCMScheduler) else None


def stepping_in_float32(one_step: SchedulerMixin) -> SchedulerMixin:
    """A scheduler of `one_step_scheduler` that forms x0 in float32 in any case; a flow's does so itself."""
    return Float32Step.from_config(one_step.config) if isinstance(one_step, LCMScheduler) else one_step


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
