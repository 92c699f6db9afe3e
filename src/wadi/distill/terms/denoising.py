"""The denoising term: what the teacher would clean off the student's images at little noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wadi.diffusion import Schedule
from wadi.distill.config import DistillConfig
from wadi.distill.draws import Drawn, Draws
from wadi.distill.terms.term import Batch, Term, generator_loss

BLOCK_SIZE = 4
"""Side of the squares, in latent pixels, whose mean the denoising term does not change: it would make colours
and sizes the likeliest ones."""


def without_block_means(x: torch.Tensor, block_size: int = BLOCK_SIZE) -> torch.Tensor:
    """(N, C, H, W) less its mean over each square of block_size x block_size, cut off at the right and below.

    What is left is finer than the squares: texture, no colour of an area.
    """
    height, width = x.shape[-2:]
    means = F.avg_pool2d(x, block_size, ceil_mode=True, count_include_pad=False)
    return x - F.interpolate(means, scale_factor=block_size)[..., :height, :width]


class Denoising(Term):
    """1/2 ||x0 - x0_teacher||^2 of what is finer than blocks, with the teacher's x0 held fixed.

    This is score distillation without a fake model (DreamFusion, arXiv 2209.14988, eq. 3), in units of x0, by
    the teacher without guidance.
    """

    name = "denoising"

    def __init__(self, config: DistillConfig, schedule: Schedule, shape: tuple[int, ...]) -> None:
        super().__init__(config, schedule, shape)
        options = config.objective.denoising
        self.weight, self.low, self.high = options.weight, config.objective.min_timestep, options.max_timestep

    def draw(self, draws: Draws, n: int) -> Drawn:
        """Times "t" (n,) at little noise, and "noise" (n, C, H, W)."""
        return {
            "t": draws.times("t", n, self.schedule, self.low, self.high),
            "noise": draws.normal("noise", n, self.shape),
        }

    def __call__(self, batch: Batch, drawn: Drawn) -> torch.Tensor:
        """See `Term.__call__`."""
        x0, t = batch.x0.detach(), drawn["t"]
        x_t = self.schedule.add_noise(x0, drawn["noise"], t)
        prediction = batch.scores.unguided_teacher(x_t, t, batch.condition)
        gradient = x0 - self.schedule.x0(prediction, x_t, t)
        return generator_loss(batch.x0, without_block_means(gradient))
