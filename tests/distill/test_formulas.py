"""The formulas of the training, against the formulas in float64 written out again."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from wadi.diffusion import RectifiedFlow, Schedule, VariancePreserving
from wadi.distill.fake import fake_loss
from wadi.distill.scores import guided
from wadi.distill.terms.denoising import without_block_means
from wadi.distill.terms.term import generator_loss
from wadi.distill.terms.vsd import SMALLEST_SIZE, normalized_vsd_gradient, vsd_gradient


@pytest.fixture
def numbers():
    """x0, n, x0_teacher, x0_fake (3, 4, 5, 5), alpha and sigma (3, 1, 1, 1), all float64."""
    torch.manual_seed(0)
    alpha = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).view(-1, 1, 1, 1)
    return *torch.randn(4, 3, 4, 5, 5, dtype=torch.float64), alpha, (1 - alpha**2).sqrt()


def test_guidance():
    null, cond = torch.tensor([1.0]), torch.tensor([3.0])
    assert [guided(null, cond, s).item() for s in (0, 1, 1.5)] == [1.0, 3.0, 4.0]


def test_generator_gradient_is_the_papers(numbers):
    """sigma^2 (eps_teacher - eps_fake), with each eps from its x0; the loss is half its mean square."""
    x0, noise, teacher, fake, alpha, sigma = numbers
    x0.requires_grad_()
    x_t = (alpha * x0 + sigma * noise).detach()
    eps_teacher, eps_fake = ((x_t - alpha * each) / sigma for each in (teacher, fake))
    expected = sigma**2 * (eps_teacher - eps_fake)
    loss = generator_loss(x0, vsd_gradient(fake - teacher, alpha, sigma))
    loss.backward()
    torch.testing.assert_close(x0.grad, expected / x0.numel())
    torch.testing.assert_close(loss.detach(), 0.5 * expected.square().mean())


def test_normalized_gradient_is_dmds(numbers):
    x0, _, teacher, fake, _, _ = numbers
    found = normalized_vsd_gradient(fake - teacher, x0, teacher)
    for i in range(len(x0)):
        torch.testing.assert_close(found[i], (fake - teacher)[i] / (x0 - teacher)[i].abs().mean())


def test_normalized_gradient_of_a_perfect_student_is_finite(numbers):
    x0, _, _, fake, _, _ = numbers
    torch.testing.assert_close(normalized_vsd_gradient(fake - x0, x0, x0), (fake - x0) / SMALLEST_SIZE)


sides = st.integers(1, 9)


@given(sides, sides, st.integers(2, 5), st.integers(0, 99))
def test_without_block_means(height, width, size, seed):
    """Against a loop over the squares, of which those at the right and below may be cut off."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, generator=generator)
    expected = x.clone()
    for top in range(0, height, size):
        for left in range(0, width, size):
            square = expected[..., top : top + size, left : left + size]
            square -= square.mean((-2, -1), keepdim=True)
    found = without_block_means(x, size)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(without_block_means(found, size), found)  # nothing is left to remove
    flat = torch.full_like(x, 3.0)
    torch.testing.assert_close(without_block_means(flat, size), torch.zeros_like(x))


PREDICTIONS = [("betas", "epsilon"), ("betas", "v_prediction"), ("flow", "flow_prediction")]


def schedule_of(kind, prediction):
    return (
        RectifiedFlow() if kind == "flow" else Schedule.from_config(DDPMScheduler(prediction_type=prediction))
    )


@pytest.mark.parametrize(("kind", "prediction"), PREDICTIONS)
def test_fake_loss_is_the_papers(kind, prediction):
    """alpha^2 (eps - n)^2 in float64, whatever the network predicts."""
    schedule, generator = schedule_of(kind, prediction), torch.Generator().manual_seed(0)
    x0, noise, p = torch.randn(3, 5, 4, 3, 3, generator=generator)
    t = schedule.sample_t(5, 0.05, 0.95, generator)
    alpha, sigma = (level.double() for level in schedule.levels(t))
    x_t = alpha * x0 + sigma * noise
    eps = {"epsilon": p, "v_prediction": sigma * x_t + alpha * p, "flow_prediction": x_t + alpha * p}[
        prediction
    ]
    expected = (alpha**2 * (eps - noise) ** 2).mean()
    found = fake_loss(schedule, p, x0, noise, t, "alpha_squared")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    plain = (p - schedule.target(x0, noise, t)).square().mean()
    torch.testing.assert_close(fake_loss(schedule, p, x0, noise, t, "none"), plain)


@pytest.mark.parametrize(("kind", "prediction"), PREDICTIONS)
def test_everything_is_finite_at_both_ends(kind, prediction):
    schedule = schedule_of(kind, prediction)
    t = torch.stack([torch.zeros_like(schedule.last), schedule.last])
    x0, noise, *predictions = torch.randn(4, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x_t = schedule.add_noise(x0, noise, t)
    teacher, fake = (schedule.x0(p, x_t, t) for p in predictions)
    for value in (
        vsd_gradient(fake - teacher, *schedule.levels(t)),
        normalized_vsd_gradient(fake - teacher, x0, teacher),
        fake_loss(schedule, predictions[0], x0, noise, t, "alpha_squared"),
        fake_loss(schedule, predictions[0], x0, noise, t, "none"),
    ):
        assert value.isfinite().all()


def test_float32_carries_the_gradient_through_the_one_step():
    """The chain x0 = (z - sigma_T eps) / alpha_T: the float32 gradient by eps is the float64 one."""
    alpha = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).view(-1, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    z, teacher, fake = torch.randn(3, 3, 4, 5, 5, dtype=torch.float64)
    schedule = VariancePreserving(torch.linspace(0.99, 0.00466, 10), "epsilon")
    eps = torch.randn(3, 4, 5, 5).requires_grad_()
    gradient = vsd_gradient(*(each.float() for each in (fake - teacher, alpha, sigma)))
    generator_loss(schedule.x0(eps, z, schedule.last.expand(3)), gradient).backward()
    expected = -((1 - 0.00466) ** 0.5 / 0.00466**0.5) * sigma * alpha * (fake - teacher) / z.numel()
    torch.testing.assert_close(eps.grad.double(), expected, rtol=1e-4, atol=1e-7)
