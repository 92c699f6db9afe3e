"""The student as a generator: from noise to a clean latent in one step."""

from __future__ import annotations

import torch

from wadi.backbones.condition import Condition
from wadi.diffusion import Schedule
from wadi.distill.scores import Predict


class Student:
    """A one-step generator.

    Args:
        schedule: its own, which may end at another alpha_T than the teacher's.
        predict: asks a network.
        network: the trained network.
    """

    def __init__(self, schedule: Schedule, predict: Predict, network: torch.nn.Module) -> None:
        self.schedule, self.predict, self.network = schedule, predict, network

    def sample(self, z: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The image x0 (N, C, H, W), float32, of every noise z ~ N(0, I), (N, C, H, W), and prompt."""
        t = self.schedule.last.expand(len(z))
        return self.schedule.x0(self.predict(self.network, z, t, condition), z, t)
