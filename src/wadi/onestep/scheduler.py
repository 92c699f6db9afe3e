"""One step, or a few, as a configuration of a stock diffusers scheduler, no fork of anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SanaPipeline,
    SchedulerMixin,
    StableDiffusion3Pipeline,
)

from wadi.diffusion import Schedule
from wadi.diffusion.schedule import (
    PREDICTIONS,
    SCHEDULE_FIELDS,
    RectifiedFlow,
    prediction_type,
    schedule_class,
)
from wadi.errors import WadiError

STEP_COUNTS = (1, 2, 4)
"""Most steps that a student may have."""
ONE_STEP = (1.0,)
"""Where a student of one step takes it: at pure noise."""
TIMESTEP_SCALING = 1e6
"""With it LCMScheduler has no boundary condition: in float32, c_out is 1 and c_skip z vanishes. It also tells
a student's scheduler from others."""
_SHIFTS = 64
"""Shifts of few steps are multiples of 1 / 64, so that float32 has the first sigma as exactly 1."""
_NEAR = 1e-5
"""Sigmas that differ by less are the same: `steps_of` rounds them to six digits."""


def gives_sigmas(kind: type[DiffusionPipeline]) -> bool:
    """Whether the pipelines of flows of this class tell the scheduler the sigmas 1, (n - 1)/n, ... 1/n.

    Stable Diffusion 3 and Sana leave the choice to the scheduler.
    """
    return not issubclass(kind, (StableDiffusion3Pipeline, SanaPipeline))


def student_scheduler(
    scheduler: SchedulerMixin | Mapping[str, Any],
    alpha_T_squared: float | None = None,
    steps: Sequence[float] = ONE_STEP,
    even: bool = False,
) -> SchedulerMixin:
    r"""Configure a stock scheduler of diffusers to be exactly the steps of a student.

    With ``num_inference_steps=1`` its ``step`` is, at T = ``num_train_timesteps - 1`` of a schedule of betas
    (WaDi, arXiv 2603.08258), and at sigma = 1 of a rectified flow,

        epsilon:          x0 = (z - sigma_T eps) / alpha_T
        v_prediction:     x0 = alpha_T z - sigma_T v
        flow_prediction:  x0 = z - v

    The first two are an `LCMScheduler`, which refuses more steps than the student has in `set_timesteps`. The
    third is a `FlowMatchEulerDiscreteScheduler`, without any shift for one step. Saved in a pipeline folder,
    they work where wadi is not installed.

        scheduler = student_scheduler(pipeline.scheduler)
        scheduler.set_timesteps(1)
        x0 = scheduler.step(unet(z, scheduler.timesteps[0], c).sample, scheduler.timesteps[0], z).prev_sample

    A scheduler of N steps also does fewer. Between two steps it adds fresh noise to x0, as the process does:
    x_t' = alpha_t' x0 + sigma_t' n. With betas, the timesteps are those of LCM, evenly spaced. For a flow,
    the last of N sigmas is ``steps[-1]``, and the spacing of the others depends on the pipeline: see `even`.

    Args:
        scheduler: the teacher's scheduler or its config; any diffusers scheduler with a beta schedule or of a
            rectified flow.
        alpha_T_squared: the student's own alpha_T^2 in (0, 1), where it was trained with another value than
            the teacher's schedule has. ``None`` keeps the schedule's; a flow takes nothing else.
        steps: where N steps are taken, from `steps_of`.
        even: for a flow of several steps, what `gives_sigmas` says of its pipeline. If true, the scheduler
            shifts the sigmas that the pipeline gives. If not, the scheduler spaces log sigma evenly.

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
        return _flow(config.get("num_train_timesteps", 1000), steps, even)
    count = len(steps)
    made = _lcm({name: config[name] for name in SCHEDULE_FIELDS if name in config}, predicted, count)
    own = float(made.alphas_cumprod[-1])
    if len(made.alphas_cumprod) % count:
        raise WadiError(
            f"--student-steps {count}: the teacher's schedule has {len(made.alphas_cumprod)} timesteps, "
            f"which is not a multiple of {count}; omit the option"
        )
    if alpha_T_squared is not None and not math.isclose(alpha_T_squared, own, rel_tol=1e-6):
        betas = _betas_ending_at(alpha_T_squared, made, count)
        made = _lcm({"num_train_timesteps": len(betas), "trained_betas": betas}, predicted, count)
        own = float(made.alphas_cumprod[-1])
    if predicted == "epsilon" and own <= 0:
        raise WadiError(
            "scheduler: alpha_T is zero (zero terminal SNR), so epsilon says nothing about the image at T; "
            "use a v_prediction teacher or set --alpha-T-squared"
        )
    return made


def last_alpha_squared(scheduler: SchedulerMixin | Mapping[str, Any]) -> float | None:
    """alpha_T^2 of one step of a model with this scheduler; ``None`` for a flow, which has none to choose.

    Raises:
        WadiError: as `student_scheduler`.
    """
    made = student_scheduler(scheduler)
    return float(made.alphas_cumprod[-1]) if isinstance(made, LCMScheduler) else None


def stepping_in_float32(made: SchedulerMixin) -> SchedulerMixin:
    """A scheduler of `student_scheduler` that forms x0 in float32 in any case.

    The scheduler of one step of a flow does so itself.
    """
    if isinstance(made, LCMScheduler):
        return Float32Step.from_config(made.config)
    return FlowMatchFloat32Step.from_config(made.config) if made.config.stochastic_sampling else made


def fractions(count: int) -> tuple[float, ...]:
    """1, (n - 1)/n, ... 1/n, for n = count."""
    return tuple((count - i) / count for i in range(count))


def steps_of(
    scheduler: SchedulerMixin | Mapping[str, Any], schedule: Schedule, count: int, even: bool
) -> tuple[float, ...]:
    """Where a student of `count` steps takes them: fractions of the timesteps, or the sigmas of a flow.

    The last one is where the schedule has the fraction 1 / count of its times.

    Args:
        scheduler: the teacher's scheduler, or its configuration.
        schedule: the teacher's, which knows its shift.
        count: one of `STEP_COUNTS`.
        even: see `student_scheduler`.
    """
    if count == 1 or not isinstance(schedule, RectifiedFlow):
        return fractions(count)
    last = float(schedule.times(torch.tensor(1 / count, dtype=torch.float64)))
    made = student_scheduler(scheduler, None, (*fractions(count)[:-1], last), even)
    return tuple(round(sigma, 6) for sigma in step_times(made, count, even).tolist())


def step_times(scheduler: SchedulerMixin, count: int, even: bool = False) -> torch.Tensor:
    """The times (count,) of `count` steps: timesteps, int64, or the sigmas of a flow, float32.

    Args:
        scheduler: from `student_scheduler`.
        count: at most the student's.
        even: as it was made with.
    """
    own = type(scheduler).from_config(scheduler.config)
    if isinstance(own, LCMScheduler):
        own.set_timesteps(count)
        return own.timesteps
    if even:
        own.set_timesteps(sigmas=list(fractions(count)))
    else:
        own.set_timesteps(count)
    return own.sigmas[:-1]


def check_places(scheduler: SchedulerMixin, steps: Sequence[float], even: bool) -> None:
    """Raise if the steps of a flow's student are not where its scheduler takes them.

    Args:
        scheduler: from `student_scheduler`, made for these steps.
        steps: of the student.
        even: as it was made with.

    Raises:
        WadiError: the steps are elsewhere, as in a `student.json` that was changed by hand.
    """
    if len(steps) == 1 or isinstance(scheduler, LCMScheduler):
        return
    taken = step_times(scheduler, len(steps), even).tolist()
    if any(abs(step - place) > _NEAR for step, place in zip(steps, taken, strict=True)):
        raise WadiError(
            f"student.json: its steps are {_listed(steps)}, but a student whose last step is there takes "
            f"them at {_listed(taken)}; fetch or export the student again"
        )


def _listed(steps: Sequence[float]) -> str:
    return ", ".join(f"{step:.6g}" for step in steps)


def _flow(timesteps: int, steps: Sequence[float], even: bool) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a flow whose last of N steps is at the sigma ``steps[-1]``."""
    count, last = len(steps), steps[-1]
    if count == 1:
        return FlowMatchEulerDiscreteScheduler(timesteps, shift=1.0)
    # the pipeline's 1 / N is shifted to the last sigma; the scheduler's 1 / timesteps is shifted twice
    odds = last / (1 - last)
    shift = (count - 1) * odds if even else math.sqrt((timesteps - 1) * odds)
    shift = max(1, round(_SHIFTS * shift)) / _SHIFTS
    return FlowMatchEulerDiscreteScheduler(
        timesteps, shift=shift, use_exponential_sigmas=not even, stochastic_sampling=True
    )


def _lcm(schedule: dict[str, Any], prediction_type: str, count: int) -> LCMScheduler:
    try:
        return LCMScheduler(
            **schedule,
            prediction_type=prediction_type,
            original_inference_steps=count,  # the first timestep is then num_train_timesteps - 1
            timestep_scaling=TIMESTEP_SCALING,
            clip_sample=False,
            steps_offset=1,  # unused here; StableDiffusionPipeline rewrites any other value with a warning
        )
    except (NotImplementedError, TypeError) as error:
        raise WadiError(f"scheduler: no one-step form of this noise schedule: {error}") from error


def _betas_ending_at(alpha_T_squared: float, teacher: LCMScheduler, count: int) -> list[float]:
    """Betas whose product of (1 - beta) is `alpha_T_squared` to float32 rounding.

    For one step they are zeros, halves and a rest: one big last beta would lose digits in 1 - beta, and
    halvings are exact. For several steps they are the teacher's but for the last, which may be negative.
    """
    if not 0 < alpha_T_squared < 1:
        raise WadiError(
            f"alpha_T_squared: {alpha_T_squared} is not between 0 and 1 (Stable Diffusion's is 0.0047)"
        )
    if count > 1:
        before = float(teacher.alphas_cumprod[-2])
        return [*teacher.betas[:-1].tolist(), 1 - alpha_T_squared / before]
    length = len(teacher.betas)
    halvings = math.floor(-math.log2(alpha_T_squared))
    rest = 1.0 - alpha_T_squared * 2.0**halvings
    if halvings + 1 > length:
        raise WadiError(f"alpha_T_squared: {alpha_T_squared} is too small for {length} training timesteps")
    return [0.0] * (length - halvings - 1) + [0.5] * halvings + [rest]


def seed_steps(
    pipeline: DiffusionPipeline, generator: torch.Generator | Sequence[torch.Generator] | None
) -> None:
    """Let the noise between the steps of a pipeline's next call come from the generator of that call.

    Most stock pipelines of flows do not hand it to their scheduler. Other pipelines need nothing.
    """
    if isinstance(pipeline.scheduler, FlowMatchFloat32Step):
        pipeline.scheduler.generator = generator


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


class FlowMatchFloat32Step(FlowMatchEulerDiscreteScheduler):
    """The scheduler of a flow's few steps in float32, with the noise of given generators.

    Most pipelines of flows do not hand their generator to the scheduler, and the noise between two steps
    would then come from torch's global generator. Used at run time only, never saved.

    Attributes:
        generator: one, or one for each image; ``None`` for torch's global one.
    """

    generator: torch.Generator | Sequence[torch.Generator] | None = None

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **options: Any
    ) -> Any:
        """Do `FlowMatchEulerDiscreteScheduler.step`; shapes, arguments and result as there."""
        in_dict = options.pop("return_dict", True)
        options = {"generator": self.generator, **options}
        output = super().step(model_output.float(), timestep, sample, **options)
        output.prev_sample = output.prev_sample.to(model_output.dtype)
        return output if in_dict else (output.prev_sample,)
