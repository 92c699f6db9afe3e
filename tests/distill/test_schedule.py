"""alpha_t, sigma_t and the conversions, against diffusers and against the equations in float64."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from wadi.distill.schedule import Schedule
from wadi.errors import WadiError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = [
    PNDMScheduler(**SD),
    DDIMScheduler(**SD, clip_sample=False),
    EulerDiscreteScheduler(**SD),
    DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    DDPMScheduler(trained_betas=[0.01 * (i + 1) for i in range(20)], num_train_timesteps=20),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_noise_levels_are_the_schedulers(scheduler):
    schedule = Schedule.from_config(scheduler)
    assert schedule.alphas.dtype == torch.float32
    assert torch.equal(schedule.alphas**2, (scheduler.alphas_cumprod**0.5) ** 2)
    assert schedule.num_train_timesteps == len(scheduler.alphas_cumprod)


def test_stable_diffusions_last_alpha():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule = Schedule.from_config(PNDMScheduler(**SD))
    assert float(schedule.alpha_T**2) == pytest.approx(float((1 - betas).prod()), rel=1e-4)
    assert float(schedule.alpha_T**2) == pytest.approx(0.00466, abs=5e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_add_noise_and_x0_are_ddims(prediction_type):
    scheduler = DDIMScheduler(
        **SD, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type
    )
    schedule = Schedule.from_config(scheduler)
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = torch.randn(3, 5, 4, 8, 8, generator=generator)
    t = torch.tensor([0, 1, 500, 998, 999])
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, t))
    scheduler.set_timesteps(1000)
    for i, step in enumerate(t):
        reference = scheduler.step(output[i], step, x_t[i]).pred_original_sample
        torch.testing.assert_close(schedule.x0(output, x_t, t)[i], reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@given(t=st.integers(0, 999), seed=st.integers(0, 2**20))
def test_conversions_recover_x0_and_noise(prediction_type, t, seed):
    schedule = Schedule(SCHEDULERS[0].alphas_cumprod, prediction_type)
    x0, noise = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    t = torch.tensor([t, t])
    alpha, sigma = schedule.alphas[t[0]].double(), schedule.sigmas[t[0]].double()
    x_t = alpha * x0 + sigma * noise
    prediction = noise if prediction_type == "epsilon" else alpha * noise - sigma * x0
    # alpha^2 + sigma^2 is 1 to float32 rounding only, as alpha and sigma are float32
    torch.testing.assert_close(schedule.epsilon(prediction, x_t, t), noise, rtol=0, atol=2e-6)
    torch.testing.assert_close(schedule.x0(prediction, x_t, t), x0, rtol=0, atol=2e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("alpha_T_squared", [None, 0.0047])
def test_one_step_formula(prediction_type, alpha_T_squared):
    schedule = Schedule(SCHEDULERS[3].alphas_cumprod, prediction_type, alpha_T_squared)
    output, z = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    squared = alpha_T_squared or SCHEDULERS[3].alphas_cumprod[-1].double().item()
    alpha, sigma = math.sqrt(squared), math.sqrt(1 - squared)
    expected = (z - sigma * output) / alpha if prediction_type == "epsilon" else alpha * z - sigma * output
    torch.testing.assert_close(schedule.one_step(output, z), expected, rtol=1e-5, atol=1e-4)
    assert schedule.one_step(output.bfloat16(), z.bfloat16()).dtype == torch.float32


def test_override_touches_the_last_step_of_the_student_only():
    own, other = (Schedule(SCHEDULERS[0].alphas_cumprod, "epsilon", value) for value in (None, 0.0047))
    assert torch.equal(own.alphas, other.alphas)
    assert own.alpha_T != other.alpha_T


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDPMScheduler(prediction_type="sample"), "sample"),
        (FlowMatchEulerDiscreteScheduler(), "no betas"),
        (DDIMScheduler(**SD, rescale_betas_zero_snr=True), "alpha_T is zero"),
    ],
)
def test_unsupported_schedules_are_refused(scheduler, message):
    with pytest.raises(WadiError, match=message):
        Schedule.from_config(scheduler)


def test_zero_terminal_snr_with_v_prediction():
    scheduler = DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    z, v = torch.randn(2, 1, 4, 2, 2)
    assert torch.equal(Schedule.from_config(scheduler).one_step(v, z), -v)
