"""The stock scheduler against the formula of one step, in float64."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from wadi.diffusion import RectifiedFlow, Schedule
from wadi.errors import WadiError
from wadi.onestep.scheduler import (
    Float32Step,
    FlowMatchFloat32Step,
    fractions,
    gives_sigmas,
    last_alpha_squared,
    step_times,
    stepping_in_float32,
    steps_of,
    student_scheduler,
)

SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": True,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
PIXART = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "algorithm_type": "dpmsolver++",
    "timestep_spacing": "linspace",
}


def alpha_T_squared_float64(config):
    start, end, steps = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["beta_schedule"] == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    else:
        betas = np.linspace(start, end, steps)
    return np.prod(1 - betas)


def formula(z, output, alpha_T_squared, prediction_type):
    alpha, sigma = alpha_T_squared**0.5, (1 - alpha_T_squared) ** 0.5
    z, output = z.double(), output.double()
    return (z - sigma * output) / alpha if prediction_type == "epsilon" else alpha * z - sigma * output


def run(scheduler, z, output):
    scheduler.set_timesteps(1)
    (timestep,) = scheduler.timesteps
    return int(timestep), scheduler.step(output, timestep, z).prev_sample


def noise(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1000, 500, 37])
@pytest.mark.parametrize(
    ("config", "alpha_T_squared"), [(SD, None), (SD, 0.0047), (PIXART, 0.0047), (PIXART, None)]
)
def test_is_the_formula(config, alpha_T_squared, steps, prediction_type):
    config = {**config, "num_train_timesteps": steps, "prediction_type": prediction_type}
    z, output = noise()
    timestep, x0 = run(student_scheduler(config, alpha_T_squared), z, output)
    expected = formula(z, output, alpha_T_squared or alpha_T_squared_float64(config), prediction_type)
    assert timestep == steps - 1
    # float32's cumprod of `steps` factors is the only source of error beyond one rounding
    tolerance = 1e-6 if alpha_T_squared else 1e-7 * steps**0.5 * 5
    assert (x0.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_sd_keeps_its_schedule_and_its_own_alpha_adds_nothing():
    own = float(student_scheduler(SD).alphas_cumprod[-1])
    assert own == pytest.approx(0.00466010, rel=1e-5)  # STACK: the paper rounds it to 0.0047
    assert student_scheduler(SD, own).config.trained_betas is None
    assert student_scheduler(SD, 0.0047).config.trained_betas is not None


@pytest.mark.parametrize("alpha_T_squared", [0.9, 0.5, 0.25, 0.0047, 4.04e-5, 1e-7])
def test_any_alpha_is_hit_to_float32_rounding(alpha_T_squared):
    scheduler = student_scheduler(SD, alpha_T_squared)
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(alpha_T_squared, rel=1.2e-7)


def test_survives_saving_and_is_idempotent(tmp_path):
    scheduler = student_scheduler(PIXART, 0.0047)
    scheduler.save_pretrained(tmp_path)
    loaded = LCMScheduler.from_pretrained(tmp_path)
    z, output = noise()
    assert torch.equal(run(loaded, z, output)[1], run(scheduler, z, output)[1])
    assert torch.equal(run(student_scheduler(loaded), z, output)[1], run(scheduler, z, output)[1])


@pytest.mark.parametrize(
    "name",
    ["PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"],
)
def test_takes_any_scheduler_of_stable_diffusion(name):
    teacher = getattr(diffusers, name).from_config(SD)
    z, output = noise()
    x0 = run(student_scheduler(teacher), z, output)[1]
    assert torch.allclose(
        x0.double(), formula(z, output, alpha_T_squared_float64(SD), "epsilon"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    z, output = noise(dtype)
    scheduler = stepping_in_float32(student_scheduler(SD))
    x0 = run(scheduler, z, output)[1]
    assert x0.dtype == dtype
    expected = formula(z, output, alpha_T_squared_float64(SD), "epsilon")
    half_ulp = torch.finfo(dtype).eps / 2
    assert ((x0.double() - expected).abs() <= half_ulp * expected.abs() * 1.01 + 1e-4).all()


def test_float32_is_the_stock_step_bit_for_bit():
    z, output = noise()
    stock = student_scheduler(SD)
    assert torch.equal(run(Float32Step.from_config(stock.config), z, output)[1], run(stock, z, output)[1])


def test_more_than_one_step_is_refused():
    with pytest.raises(ValueError, match="original_steps"):
        student_scheduler(SD).set_timesteps(2)


@pytest.mark.parametrize(
    ("change", "alpha_T_squared", "message"),
    [
        ({"prediction_type": "sample"}, None, "prediction_type 'sample'"),
        ({"beta_schedule": "sigmoid"}, None, "noise schedule"),
        ({"rescale_betas_zero_snr": True}, None, "alpha_T is zero"),
        ({}, 0.0, "not between 0 and 1"),
        ({}, 1.5, "not between 0 and 1"),
        ({"num_train_timesteps": 3}, 0.0047, "too small"),
    ],
)
def test_refusals_are_one_line(change, alpha_T_squared, message):
    with pytest.raises(WadiError, match=message) as caught:
        student_scheduler({**SD, **change}, alpha_T_squared)
    assert "\n" not in str(caught.value)


def test_zero_terminal_snr_is_fine_for_v():
    config = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    z, output = noise()
    x0 = run(student_scheduler(config), z, output)[1]
    assert torch.allclose(x0, -output, atol=1e-6)


def forms(scheduler, folder):
    """A scheduler, its configuration, and what a folder says of it."""
    scheduler.save_pretrained(folder)
    return scheduler, scheduler.config, LCMScheduler.load_config(folder)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "IPNDMScheduler"])
def test_schedules_of_another_kind_are_refused(name, tmp_path):
    for given in forms(getattr(diffusers, name)(), tmp_path):
        with pytest.raises(WadiError, match="is neither a schedule of betas nor a rectified flow"):
            student_scheduler(given)


SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOWS = {
    "static": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "dynamic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "linear": (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    ),
    "terminal": ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.02}),
    "stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "few timesteps": ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 37}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "LCM": ("FlowMatchLCMScheduler", {"shift": 3.0}),
    "UniPC": ("UniPCMultistepScheduler", {**SOLVER, "flow_shift": 3.0}),
    "DPM": ("DPMSolverMultistepScheduler", {**SOLVER, "flow_shift": 3.0}),
}


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flow_is_one_stock_step_from_sigma_1(kind, dtype, tmp_path):
    """x0 = z - v, formed in float32 and rounded once, whatever the teacher's scheduler does."""
    name, options = FLOWS[kind]
    teacher = getattr(diffusers, name)(**options)
    steps = teacher.config.num_train_timesteps
    z, v = noise(dtype)
    for given in forms(teacher, tmp_path):
        made = student_scheduler(given)
        expected = FlowMatchEulerDiscreteScheduler(steps, shift=1.0)
        assert type(made) is FlowMatchEulerDiscreteScheduler
        assert dict(made.config) == dict(expected.config)
        assert last_alpha_squared(given) is None
        timestep, x0 = run(stepping_in_float32(made), z, v)
        assert timestep == steps
        assert torch.equal(x0, (z.float() - v.float()).to(dtype))
        assert torch.equal(x0, run(expected, z, v)[1])


@pytest.mark.parametrize("kind", FLOWS)
def test_a_flow_has_no_alpha_to_choose(kind):
    name, options = FLOWS[kind]
    with pytest.raises(
        WadiError, match=r"--alpha-T-squared 0\.0047: the model is a rectified flow.*; omit it"
    ):
        student_scheduler(getattr(diffusers, name)(**options), 0.0047)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("predicted", ["epsilon", "sample"])
def test_a_flow_that_predicts_something_else_is_refused(name, predicted):
    scheduler = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type=predicted)
    with pytest.raises(WadiError, match=f"'{predicted}' cannot be distilled; .* 'flow_prediction'"):
        student_scheduler(scheduler)


@pytest.mark.parametrize("prediction_type", ["sample", "flow_prediction", "nonsense"])
def test_other_predictions_are_refused(prediction_type):
    with pytest.raises(WadiError, match=f"prediction_type '{prediction_type}' cannot be distilled"):
        student_scheduler({**SD, "prediction_type": prediction_type})


# --- several steps ---


@pytest.mark.parametrize(
    ("most", "times"),
    [
        (1, [[999]]),
        (2, [[999], [999, 499]]),
        (4, [[999], [999, 499], [999, 749, 499], [999, 749, 499, 249]]),
    ],
)
def test_timesteps_of_several_steps(most, times):
    scheduler = student_scheduler(SD, steps=fractions(most))
    assert [step_times(scheduler, count).tolist() for count in range(1, most + 1)] == times
    with pytest.raises(ValueError, match=r"smaller than|larger than"):
        scheduler.set_timesteps(most + 1)


@pytest.mark.parametrize("alpha_T_squared", [None, 0.0047, 0.001])
@pytest.mark.parametrize(
    "config", [SD, PIXART, {**SD, "rescale_betas_zero_snr": True}], ids=["sd", "pixart", "zero"]
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_several_steps_add_noise_as_the_process_does(config, prediction_type, alpha_T_squared, tmp_path):
    """Every step against the formulas in float64; only the last timestep may have another alpha."""
    config = {**config, "prediction_type": prediction_type}
    teacher = Schedule.from_config(config)
    if prediction_type == "epsilon" and "rescale_betas_zero_snr" in config and alpha_T_squared is None:
        with pytest.raises(WadiError, match="alpha_T is zero"):
            student_scheduler(config, None, fractions(4))
        return
    student_scheduler(config, alpha_T_squared, fractions(4)).save_pretrained(tmp_path)
    scheduler = LCMScheduler.from_pretrained(tmp_path)
    squared = teacher.alphas.double().square()
    if alpha_T_squared is not None:
        squared[-1] = alpha_T_squared
    found = scheduler.alphas_cumprod.double()
    assert torch.allclose(found, squared, rtol=3e-5, atol=1e-9)
    scheduler.set_timesteps(4)
    (x, output), generator, same = noise(), *(torch.Generator().manual_seed(9) for _ in range(2))
    for t, after in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        output = output * 0.5 + 0.1
        made = scheduler.step(output, t, x, generator)
        x0 = formula(x, output, found[t].item(), prediction_type)
        assert torch.allclose(made.denoised.double(), x0, rtol=1e-5, atol=1e-5)
        if after is None:
            assert torch.equal(made.prev_sample, made.denoised)
            break
        fresh = torch.randn(x.shape, generator=same).double()
        expected = found[after].sqrt() * x0 + (1 - found[after]).sqrt() * fresh
        assert torch.allclose(made.prev_sample.double(), expected, rtol=1e-5, atol=1e-5)
        x = made.prev_sample


def test_a_schedule_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(WadiError, match="--student-steps 4: the teacher's schedule has 998 timesteps"):
        student_scheduler({**SD, "num_train_timesteps": 998}, steps=fractions(4))
    assert student_scheduler({**SD, "num_train_timesteps": 998}, steps=fractions(2)) is not None


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


@pytest.mark.parametrize("shift", [1.0, 1.6, 3.0, 6.0, 2.7182818])
@pytest.mark.parametrize("most", [2, 4])
@pytest.mark.parametrize("even", [True, False])
def test_sigmas_of_several_steps_of_a_flow(shift, most, even):
    """The first is exactly 1, the last is where the teacher has the fraction 1 / most, and they fall."""
    schedule = RectifiedFlow(shift)
    steps = steps_of(FLOW, schedule, most, even)
    scheduler = student_scheduler(FLOW, None, steps, even)
    every = [step_times(scheduler, count, even) for count in range(1, most + 1)]
    for sigmas in every:
        assert sigmas[0] == 1
        assert (sigmas.diff() < 0).all()
    assert every[-1][-1].item() == pytest.approx(float(schedule.times(torch.tensor(1 / most))), abs=5e-3)
    if even:  # the teacher's own times
        own = schedule.times(torch.tensor(fractions(most)))
        assert torch.allclose(every[-1], own, atol=5e-3)
    # student.json holds the steps, and they alone give the same scheduler again
    assert steps == pytest.approx(every[-1].tolist(), abs=1e-6)
    again = student_scheduler(scheduler, None, steps, even)
    assert again.config == scheduler.config


def test_which_pipelines_tell_their_scheduler_the_sigmas():
    """Each makes its own choice when it is called: see the tests of whole pipelines."""
    told = ("FluxPipeline", "Flux2KleinPipeline", "ZImagePipeline", "QwenImagePipeline")
    assert all(gives_sigmas(getattr(diffusers, name)) for name in told)
    others = ("StableDiffusion3Pipeline", "SanaPipeline")
    assert not any(gives_sigmas(getattr(diffusers, name)) for name in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flow_steps_in_float32_with_the_given_noise(dtype):
    steps = steps_of(FLOW, RectifiedFlow(3.0), 4, True)
    scheduler = stepping_in_float32(student_scheduler(FLOW, None, steps, True))
    assert isinstance(scheduler, FlowMatchFloat32Step)
    scheduler.set_timesteps(sigmas=list(fractions(4)))
    scheduler.generator, same = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    x, output = noise(dtype)
    made = scheduler.step(output, scheduler.timesteps[0], x, return_dict=False)[0]
    sigma = scheduler.sigmas[1]
    x0 = x.float() - output.float()
    expected = (1 - sigma) * x0 + sigma * torch.randn(x.shape, generator=same)
    assert made.dtype == dtype
    assert torch.equal(made, expected.to(dtype))
