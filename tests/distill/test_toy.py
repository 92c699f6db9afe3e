"""The objective in a world whose images are one number, where the answer is known."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from wadi.diffusion import Schedule
from wadi.distill import DistillConfig
from wadi.distill.draws import Draws
from wadi.distill.fake import FakeModel
from wadi.distill.scores import Scores
from wadi.distill.student import Student
from wadi.distill.terms import Batch, terms_of

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "shifted flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "epsilon": DDPMScheduler(**SD),
    "v_prediction": DDPMScheduler(**SD, prediction_type="v_prediction"),
}
SHAPE, MEAN, DEVIATION = (1, 1, 1), 2.0, 0.5


class Normal(torch.nn.Module):
    """Predicts exactly what a network should that saw images ~ N(mean, deviation^2)."""

    def __init__(self, schedule, mean, deviation):
        super().__init__()
        self.schedule = schedule
        self.mean, self.log = (torch.nn.Parameter(torch.tensor(x)) for x in (mean, deviation))
        self.log.data.log_()

    def forward(self, x_t, t):
        (alpha, sigma), variance = self.schedule.levels(t), (2 * self.log).exp()
        residual = (x_t - alpha * self.mean) / (alpha**2 * variance + sigma**2)
        x0, noise = self.mean + alpha * variance * residual, sigma * residual
        return self.schedule.target(x0, noise, t)


class Line(torch.nn.Module):
    """A student that makes x0 = a z + b, whatever it has to predict for that."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.a, self.b = schedule, *(torch.nn.Parameter(torch.tensor(x)) for x in (1.0, 0.0))

    def forward(self, z, t):
        alpha, sigma = self.schedule.levels(t)
        x0 = self.a * z + self.b
        noise = (z - alpha * x0) / sigma
        return self.schedule.target(x0, noise, t)


@pytest.mark.parametrize(
    ("name", "weighting"),
    [
        ("shifted flow", "sigma_squared"),
        ("epsilon", "sigma_squared"),
        ("v_prediction", "normalized"),
    ],
)
def test_a_student_learns_its_teachers_distribution(name, weighting):
    """The student goes from N(0, 1) to the teacher's mean and deviation."""
    schedule, n = Schedule.from_config(SCHEDULERS[name]), 256
    config = DistillConfig.of(weighting=weighting, guidance_scale=1.0, fake_weighting="none")
    teacher, fake, line = Normal(schedule, MEAN, DEVIATION), Normal(schedule, 0.0, 1.0), Line(schedule)

    def predict(network, x_t, t, condition):
        return network(x_t, t)

    student = Student(schedule, predict, line, [schedule.last[None]])
    scores = Scores(config, schedule, predict, teacher, fake, {}, SHAPE)
    fake_model = FakeModel(config.fake, schedule, predict, fake, {}, SHAPE)
    (term,) = terms_of(config, schedule, SHAPE)
    optimizers = [torch.optim.Adam(line.parameters(), 0.1), torch.optim.Adam(fake.parameters(), 0.2)]
    for step in range(300):
        draws = Draws(0, step, torch.device("cpu"))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.985
        x0 = student.sample(draws.normal("z", n, SHAPE), {})
        place = scores.at(x0, scores.draw(draws.of("scores"), n), {})
        _descend(optimizers[0], term(Batch(x0, {}, place, scores), {}))
        for update in range(2):
            drawn = fake_model.draw(draws.of(f"fake/{update}"), n)
            _descend(optimizers[1], fake_model.loss(x0.detach(), {}, drawn, slice(None)))
    assert float(line.b.detach()) == pytest.approx(MEAN, abs=0.1)
    assert float(line.a.detach()) == pytest.approx(DEVIATION, abs=0.1)


def _descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
