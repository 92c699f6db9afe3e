"""The losses of WaDi (arXiv 2603.08258): pure functions of float32 tensors that know no model.

Shapes: predictions, noise and latents are (N, C, H, W); alpha_t and sigma_t are (N, 1, 1, 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK_SIZE = 4
"""Side of the squares, in latent pixels, whose mean the denoising term does not change: it would make colours
and sizes the likeliest ones."""


def guided(null: torch.Tensor, cond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance, p = p_null + s (p_cond - p_null); a tensor s is (N, 1, 1, 1)."""
    return null + scale * (cond - null)


def interval_scale(
    scale: float | torch.Tensor, above: float | torch.Tensor, t: torch.Tensor, highest: int | torch.Tensor
) -> torch.Tensor:
    """Guidance at the timesteps t (N,): `scale` up to `highest`, `above` beyond it.

    As of "Applying Guidance in a Limited Interval" (Kynkaanniemi et al., arXiv 2404.07724, eq. 6), without
    its lower end. Everything but t may be of shape (N,) too.
    """
    return torch.where(t <= highest, scale, above)


def vsd_gradient(eps_teacher: torch.Tensor, eps_fake: torch.Tensor, sigma_t: torch.Tensor) -> torch.Tensor:
    """Variational score distillation with the paper's weight: sigma_t^2 (eps_teacher - eps_fake)."""
    return sigma_t**2 * (eps_teacher - eps_fake)


def normalized_vsd_gradient(
    eps_teacher: torch.Tensor, eps_fake: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """The same direction with DMD's weight (arXiv 2311.18828, eq. 8): one size for every sample and timestep.

    DMD divides (x0_fake - x0_teacher) by mean |x0 - x0_teacher|, the mean over a sample's elements. Both
    differences are sigma_t / alpha_t times differences of noise, which cancels:

        grad_x0 = (eps_teacher - eps_fake) / mean |eps_teacher - n|
    """
    size = (eps_teacher - noise).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (eps_teacher - eps_fake) / size.clamp_min(1e-6)


def denoising_gradient(
    eps_teacher: torch.Tensor, noise: torch.Tensor, sigma_over_alpha: torch.Tensor
) -> torch.Tensor:
    """Score distillation without a fake model (DreamFusion, arXiv 2209.14988, eq. 3), in units of x_0.

    With x0_teacher what the teacher takes for x_0 at x_t,

        grad_x0 = x0 - x0_teacher = sigma_t / alpha_t (eps_teacher - n)

    Meant for little noise, where it is what the teacher would clean off a picture.
    """
    return sigma_over_alpha * (eps_teacher - noise)


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


def fake_loss(eps_fake: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """weight (eps_fake - n)^2, mean over elements; the paper's weight is alpha_t^2."""
    return (weight * (eps_fake - noise) ** 2).mean()
