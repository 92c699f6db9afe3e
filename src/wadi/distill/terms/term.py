"""What every term of the student's objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from wadi.backbones.condition import Condition
from wadi.diffusion import Schedule
from wadi.distill.config import DistillConfig
from wadi.distill.draws import Drawn, Draws
from wadi.distill.scores import Place, Scores


@dataclass(frozen=True)
class Batch:
    """A micro-batch of the student's images, as the terms see it.

    Attributes:
        x0: (N, C, H, W) float32, with gradient.
        condition: of their N prompts.
        place: where the step judges them, with the scores there.
        scores: asks teacher and fake model elsewhere.
    """

    x0: torch.Tensor
    condition: Condition
    place: Place
    scores: Scores


class Term(ABC):
    """A term of the student's loss. Only the term's own file reads its options.

    Args:
        config: the options.
        schedule: the teacher's.
        shape: (C, H, W) of the latents.

    Attributes:
        name: names the term's group of options, its draws, and its loss in the metrics, "<name>_loss".
        weight: of its loss in the sum.
    """

    name: ClassVar[str]
    weight: float = 1.0

    def __init__(self, config: DistillConfig, schedule: Schedule, shape: tuple[int, ...]) -> None:
        self.schedule, self.shape = schedule, shape

    def draw(self, draws: Draws, n: int) -> Drawn:
        """What the term draws for n samples: tensors whose first dimension is n."""
        return {}

    @abstractmethod
    def __call__(self, batch: Batch, drawn: Drawn) -> torch.Tensor:
        """The loss of a micro-batch, 0-dimensional, from its part of what `draw` gave."""


def generator_loss(x0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """1/2 ||x0 - stopgrad(x0 - grad)||^2, mean over elements: its derivative by x0 is grad / numel."""
    return 0.5 * F.mse_loss(x0, (x0 - gradient).detach())
