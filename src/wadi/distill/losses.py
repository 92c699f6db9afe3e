"""The losses of WaDi (arXiv 2603.08258): pure functions of float32 tensors that know no model.

Shapes: x0, predictions and noise are (N, C, H, W); alpha and sigma are (N, 1, 1, 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wadi.diffusion import Schedule

SMALLEST_SIZE = 1e-3
"""Smallest divisor of the normalized gradient, in units of x0. Public code for flow models has 0.1, but the
teacher changes a latent by about 0.01 at little noise, and the gradient there would become ten times smaller
than elsewhere. Below 1e-3, at the very end of a schedule, the change is mostly float32 rounding."""

BLOCK_SIZE = 4
"""Side of the squares, in latent pixels, whose mean the denoising term does not change: it would make colours
and sizes the likeliest ones."""


def guided(null: torch.Tensor, cond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance, p = p_null + s (p_cond - p_null); a tensor s is (N, 1, 1, 1)."""
    return null + scale * (cond - null)


def interval_scale(
    scale: float | torch.Tensor, above: float | torch.Tensor, t: torch.Tensor, highest: torch.Tensor
) -> torch.Tensor:
    """Guidance at the times t (N,): `scale` up to `highest`, `above` beyond it.

    This is "Applying Guidance in a Limited Interval" (Kynkaanniemi et al., arXiv 2404.07724, eq. 6), without
    its lower end. Everything but t may be of shape (N,) too.
    """
    return torch.where(t <= highest, scale, above)


def vsd_gradient(
    x0_teacher: torch.Tensor, x0_fake: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Variational score distillation with the paper's weight: sigma alpha (x0_fake - x0_teacher).

    This is the paper's sigma^2 (eps_teacher - eps_fake), because x0 = (x_t - sigma eps) / alpha. It is finite
    at both ends of every schedule.
    """
    return sigma * alpha * (x0_fake - x0_teacher)


def normalized_vsd_gradient(
    x0: torch.Tensor, x0_teacher: torch.Tensor, x0_fake: torch.Tensor
) -> torch.Tensor:
    """The same direction with DMD's weight (arXiv 2311.18828, eq. 8): one size for every sample and time.

        grad_x0 = (x0_fake - x0_teacher) / max(mean |x0 - x0_teacher|, SMALLEST_SIZE)

    The mean is over a sample's elements.
    """
    size = (x0 - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (x0_fake - x0_teacher) / size.clamp_min(SMALLEST_SIZE)


def without_block_means(x: torch.Tensor, block_size: int = BLOCK_SIZE) -> torch.Tensor:
    """(N, C, H, W) less its mean over each square of block_size x block_size, cut off at the right and below.

    What is left is finer than the squares: texture, no colour of an area.
    """
    height, width = x.shape[-2:]
    means = F.avg_pool2d(x, block_size, ceil_mode=True, count_include_pad=False)
    return x - F.interpolate(means, scale_factor=block_size)[..., :height, :width]


def generator_loss(x0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """1/2 ||x0 - stopgrad(x0 - grad)||^2, mean over elements: its derivative by x0 is grad / numel."""
    return 0.5 * F.mse_loss(x0, (x0 - gradient).detach())


def fake_loss(
    schedule: Schedule,
    prediction: torch.Tensor,
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    weighting: str,
) -> torch.Tensor:
    """What the fake model minimises at x_t = alpha x0 + sigma n, mean over elements.

    Args:
        schedule: gives alpha and what the network should predict.
        prediction: the network's at x_t.
        x0: clean latents.
        noise: n.
        t: (N,), the times.
        weighting: "alpha_squared", the paper's alpha^2 (eps - n)^2; or "none", the plain error of what the
            network predicts, as its teacher was trained.
    """
    if weighting == "none":
        return F.mse_loss(prediction, schedule.target(x0, noise, t))
    alpha, _ = schedule.levels(t)
    x_t = schedule.add_noise(x0, noise, t)
    return (alpha * (schedule.noise(prediction, x_t, t) - noise)).square().mean()
