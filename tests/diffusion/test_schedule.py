"""The table of predictions: its two inverses, diffusers' schedulers, and what is refused."""

import math

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from hypothesis import given
from hypothesis import strategies as st

from wadi.diffusion import RectifiedFlow, Schedule, VariancePreserving
from wadi.errors import WadiError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = [
    *(("betas", prediction) for prediction in ("epsilon", "v_prediction", "sample")),
    *(("flow", prediction) for prediction in ("flow_prediction", "sample")),
]


def make(kind, prediction):
    if kind == "flow":
        return RectifiedFlow(3.0, prediction)
    return Schedule.from_config(DDPMScheduler(**SD, prediction_type=prediction))


def latents(count=3):
    return torch.randn(2, count, 4, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "prediction"), KINDS)
@given(low=st.floats(0.05, 0.9), width=st.floats(0.0, 0.1), seed=st.integers(0, 2**31))
def test_a_prediction_gives_back_what_it_was_made_of(kind, prediction, low, width, seed):
    """x0(target(x0, n), x_t) = x0 and noise(...) = n, up to float32 amplified by 1 / d."""
    schedule, (x0, noise) = make(kind, prediction), latents()
    t = schedule.sample_t(3, low, low + width, torch.Generator().manual_seed(seed))
    x_t, p = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    torch.testing.assert_close(schedule.x0(p, x_t, t), x0, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(schedule.noise(p, x_t, t), noise, rtol=1e-4, atol=1e-3)
    alpha, sigma = schedule.levels(t)
    total = alpha + sigma if kind == "flow" else alpha**2 + sigma**2
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_levels_are_diffusers(prediction):
    scheduler = DDPMScheduler(**SD, prediction_type=prediction)
    schedule, (x0, noise) = Schedule.from_config(scheduler), latents()
    t = torch.tensor([0, 500, 999])
    x_t = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), x_t)
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(schedule.target(x0, noise, t), expected)


@pytest.mark.parametrize("alpha_T_squared", [None, 0.0047, 0.3])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_step_is_the_stock_scheduler(prediction, alpha_T_squared):
    """Bit for bit what `LCMScheduler.step` computes with the same alpha_T."""
    schedule = Schedule.from_config(DDPMScheduler(**SD, prediction_type=prediction))
    student = schedule.ending_at(alpha_T_squared)
    assert torch.equal(student.alphas[:-1], schedule.alphas[:-1])
    stock = LCMScheduler(
        **SD, prediction_type=prediction, original_inference_steps=1, timestep_scaling=1e6, clip_sample=False
    )
    if alpha_T_squared is not None:
        stock.alphas_cumprod[-1] = alpha_T_squared
    stock.set_timesteps(1)
    z, p = latents()
    t = student.last.expand(len(z))
    expected = stock.step(p, stock.timesteps[0], z).prev_sample
    assert torch.equal(student.x0(p, z, t), expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_step_of_a_flow_is_the_stock_scheduler(shift):
    """Bit for bit what `FlowMatchEulerDiscreteScheduler.step` computes from sigma = 1 to 0: x0 = z - v."""
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = Schedule.from_config(stock)
    stock.set_timesteps(sigmas=[1.0])
    z, v = latents()
    t = schedule.last.expand(len(z))
    assert torch.equal(schedule.x0(v, z, t), stock.step(v, stock.timesteps[0], z).prev_sample)
    assert torch.equal(schedule.timestep(t), stock.timesteps.expand(len(z)))


@given(u=st.floats(0, 1), tokens=st.integers(16, 16384))
def test_times_of_a_flow_are_shifted_as_the_stock_scheduler_shifts(u, tokens):
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    static.set_timesteps(sigmas=[u])
    ours = Schedule.from_config(static).times(torch.tensor(u))
    torch.testing.assert_close(ours, static.sigmas[0], rtol=1e-5, atol=1e-6)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)  # FLUX.1's numbers are the defaults
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    schedule = Schedule.from_config(dynamic, image_tokens=tokens)
    assert math.isclose(float(schedule.shift), math.exp(mu), rel_tol=1e-5)
    if u > 1e-3:
        dynamic.set_timesteps(sigmas=[u], mu=mu)
        torch.testing.assert_close(schedule.times(torch.tensor(u)), dynamic.sigmas[0], rtol=1e-4, atol=1e-6)


def test_drawn_times_fill_their_range():
    for kind, prediction in KINDS:
        schedule, generator = make(kind, prediction), torch.Generator().manual_seed(0)
        t = schedule.sample_t(4000, 0.2, 0.8, generator)
        low, high = (schedule.times(torch.tensor(f)) for f in (0.2, 0.8))
        assert t.shape == (4000,)
        assert low <= t.min() < low + 0.01 * schedule.last
        assert high - 0.01 * schedule.last < t.max() <= high


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": -1.0}),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "epsilon"}),
    ],
)
def test_other_schedules_are_refused_in_one_line(name, options):
    with pytest.raises(WadiError, match="scheduler") as caught:
        Schedule.from_config(getattr(diffusers, name)(**options))
    assert "\n" not in str(caught.value)


def test_a_configuration_alone_is_refused_by_its_class():
    with pytest.raises(WadiError, match="CosineDPMSolverMultistepScheduler"):
        Schedule.from_config({"_class_name": "CosineDPMSolverMultistepScheduler", "sigma_min": 0.3})


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_solvers_of_a_flow_are_read(name):
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    schedule = Schedule.from_config(getattr(diffusers, name)(**options))
    assert isinstance(schedule, RectifiedFlow)
    assert float(schedule.shift) == 3.0


def test_zero_terminal_snr_needs_an_alpha():
    zero = DDPMScheduler(**SD, rescale_betas_zero_snr=True)
    schedule = Schedule.from_config(zero)
    assert isinstance(schedule, VariancePreserving)
    with pytest.raises(WadiError, match="alpha-T-squared"):
        schedule.ending_at(None)
    assert math.isclose(float(schedule.ending_at(0.0047).alphas[-1]) ** 2, 0.0047, rel_tol=1e-6)
