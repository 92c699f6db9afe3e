"""The steps of a student, as ComfyUI counts noise levels: against the schedules of wadi and of diffusers."""

import pytest
import torch
from diffusers import LCMScheduler

from integrations.comfyui.sampling import chosen, discrete_sigmas, flow_sigmas
from wadi.diffusion import Schedule

SCHEDULES = {
    "Stable Diffusion": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "PixArt": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
}


def table_of(schedule):
    alpha, sigma = schedule.levels(torch.arange(int(schedule.last) + 1))
    return (sigma / alpha).flatten()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("alpha_T_squared", [None, 0.0047, 0.02])
def test_the_first_step_is_at_the_last_alpha_of_the_student(name, alpha_T_squared):
    schedule = Schedule.from_config({"_class_name": "DDIMScheduler", **SCHEDULES[name]})
    own = schedule.ending_at(alpha_T_squared)
    table, sigmas = discrete_sigmas(table_of(schedule), [1.0], alpha_T_squared)
    torch.testing.assert_close(table, table_of(own))
    assert sigmas.tolist() == [table[-1], 0]


@pytest.mark.parametrize(("most", "count"), [(1, 1), (2, 2), (2, 1), (4, 4), (4, 3), (4, 2), (4, 1), (8, 5)])
def test_fewer_steps_are_those_of_lcm(most, count):
    scheduler = LCMScheduler(**SCHEDULES["Stable Diffusion"], original_inference_steps=most)
    scheduler.set_timesteps(count)
    steps = chosen([(most - i) / most for i in range(most)], count, flow=False)
    squared = scheduler.alphas_cumprod
    table, sigmas = discrete_sigmas(((1 - squared) / squared).sqrt(), steps)
    assert torch.equal(sigmas[:-1], table[scheduler.timesteps])
    assert sigmas[-1] == 0


def test_a_flow_takes_one_step_or_all():
    steps = (1.0, 0.9, 0.75, 0.5)
    assert chosen(steps, 0, flow=True) == list(steps)
    assert flow_sigmas(chosen(steps, 4, flow=True)).tolist() == pytest.approx([*steps, 0.0])
    assert flow_sigmas(chosen(steps, 1, flow=True)).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="takes 1 or 4, not 2"):
        chosen(steps, 2, flow=True)


def test_more_steps_than_the_student_has_are_refused():
    with pytest.raises(ValueError, match="5 asked for, and the student was made for 4"):
        chosen((1.0, 0.75, 0.5, 0.25), 5, flow=False)
