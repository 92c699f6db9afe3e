"""The losses, against the formulas in float64 written out again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wadi.distill.losses import (
    denoising_gradient,
    fake_loss,
    generator_loss,
    guided,
    normalized_vsd_gradient,
    vsd_gradient,
    without_block_means,
)
from wadi.distill.schedule import Schedule


@pytest.fixture
def numbers():
    """x0, n, eps_teacher, eps_fake (3, 4, 5, 5), alpha_t and sigma_t (3, 1, 1, 1), all float64."""
    torch.manual_seed(0)
    alpha = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).view(-1, 1, 1, 1)
    return *torch.randn(4, 3, 4, 5, 5, dtype=torch.float64), alpha, (1 - alpha**2).sqrt()


def test_guidance():
    null, cond = torch.tensor([1.0]), torch.tensor([3.0])
    assert [guided(null, cond, s).item() for s in (0, 1, 1.5)] == [1.0, 3.0, 4.0]


def test_generator_gradient_is_the_papers(numbers):
    x0, _, teacher, fake, _, sigma = numbers
    x0.requires_grad_()
    generator_loss(x0, vsd_gradient(teacher, fake, sigma)).backward()
    torch.testing.assert_close(x0.grad, sigma**2 * (teacher - fake) / x0.numel())


def test_generator_loss_value(numbers):
    x0, _, teacher, fake, _, sigma = numbers
    expected = sum((s**2 * (a - b)).pow(2).sum() for s, a, b in zip(sigma, teacher, fake, strict=True))
    torch.testing.assert_close(
        generator_loss(x0, vsd_gradient(teacher, fake, sigma)), 0.5 * expected / x0.numel()
    )


def test_normalized_gradient_is_dmds_in_x0(numbers):
    x0, noise, teacher, fake, alpha, sigma = numbers
    x_t = alpha * x0 + sigma * noise
    x0_teacher, x0_fake = (x_t - sigma * teacher) / alpha, (x_t - sigma * fake) / alpha
    for i in range(len(x0)):
        expected = (x0_fake - x0_teacher)[i] / (x0 - x0_teacher)[i].abs().mean()
        torch.testing.assert_close(normalized_vsd_gradient(teacher, fake, noise)[i], expected)


def test_denoising_gradient_is_the_distance_to_the_teachers_picture(numbers):
    x0, noise, teacher, _, alpha, sigma = numbers
    x0_teacher = (alpha * x0 + sigma * noise - sigma * teacher) / alpha
    torch.testing.assert_close(denoising_gradient(teacher, noise, sigma / alpha), x0 - x0_teacher)


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


def test_fake_loss(numbers):
    _, noise, _, fake, alpha, _ = numbers
    torch.testing.assert_close(fake_loss(fake, noise, alpha**2), ((alpha * fake - alpha * noise) ** 2).mean())
    torch.testing.assert_close(fake_loss(fake, noise, 1.0), ((fake - noise) ** 2).mean())


def test_float32_carries_the_gradient_through_the_one_step(numbers):
    """The chain x0 = (z - sigma_T eps) / alpha_T: the float32 gradient by eps is the float64 one."""
    x0, _, teacher, fake, _, sigma = numbers
    schedule = Schedule(torch.linspace(0.99, 0.00466, 10), "epsilon")
    eps = torch.randn_like(x0).float().requires_grad_()
    gradient = vsd_gradient(teacher.float(), fake.float(), sigma.float())
    generator_loss(schedule.one_step(eps, x0), gradient).backward()
    expected = -((1 - 0.00466) ** 0.5 / 0.00466**0.5) * sigma**2 * (teacher - fake) / x0.numel()
    torch.testing.assert_close(eps.grad.double(), expected, rtol=1e-4, atol=1e-7)
