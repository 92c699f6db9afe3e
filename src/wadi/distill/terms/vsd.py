"""Variational score distillation: from what the fake model takes for x0 to what the teacher takes for it."""

from __future__ import annotations

import torch

from wadi.diffusion import Schedule
from wadi.distill.config import DistillConfig
from wadi.distill.draws import Drawn
from wadi.distill.terms.term import Batch, Term, generator_loss

SMALLEST_SIZE = 1e-3
"""Smallest divisor of the normalized gradient, in units of x0. Public code for flow models has 0.1, but the
teacher changes a latent by about 0.01 at little noise, and the gradient there would become ten times smaller
than elsewhere. Below 1e-3, at the very end of a schedule, the change is mostly float32 rounding."""


def vsd_gradient(difference: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Variational score distillation with the paper's weight: sigma alpha (x0_fake - x0_teacher).

    This is the paper's sigma^2 (eps_teacher - eps_fake), because x0 = (x_t - sigma eps) / alpha. It is finite
    at both ends of every schedule.

    Args:
        difference: x0_fake - x0_teacher (N, C, H, W).
        alpha: (N, 1, 1, 1).
        sigma: (N, 1, 1, 1).
    """
    return sigma * alpha * difference


def normalized_vsd_gradient(
    difference: torch.Tensor, x0: torch.Tensor, x0_teacher: torch.Tensor
) -> torch.Tensor:
    """The same direction with DMD's weight (arXiv 2311.18828, eq. 8): one size for every sample and time.

        grad_x0 = (x0_fake - x0_teacher) / max(mean |x0 - x0_teacher|, SMALLEST_SIZE)

    The mean is over a sample's elements; all arguments are (N, C, H, W).
    """
    size = (x0 - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    return difference / size.clamp_min(SMALLEST_SIZE)


class Vsd(Term):
    """The distillation gradient at the step's own place, with the paper's weight or DMD's."""

    name = "student"

    def __init__(self, config: DistillConfig, schedule: Schedule, shape: tuple[int, ...]) -> None:
        super().__init__(config, schedule, shape)
        self.normalized = config.objective.weighting == "normalized"

    def gradient(self, batch: Batch) -> torch.Tensor:
        """The gradient by x0 of every sample, (N, C, H, W), without gradient itself."""
        place = batch.place
        if self.normalized:
            return normalized_vsd_gradient(place.difference, batch.x0.detach(), place.x0_teacher)
        return vsd_gradient(place.difference, place.alpha, place.sigma)

    def __call__(self, batch: Batch, drawn: Drawn) -> torch.Tensor:
        """See `Term.__call__`."""
        return generator_loss(batch.x0, self.gradient(batch))
