"""What teacher and fake model predict at a noisy image (x_t, t), with guidance, and the x0 of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

from wadi.backbones import Backbone
from wadi.backbones.base import guided
from wadi.backbones.condition import Condition, concatenate, repeat
from wadi.diffusion import Schedule
from wadi.distill.config import DistillConfig
from wadi.distill.draws import Drawn, Draws

Predict = Callable[..., torch.Tensor]
"""What a network predicts for latents (N, C, H, W), times (N,) and N prompts, float32. A network that
takes the guidance as an input gets a fifth argument, or else the default guidance of its pipeline."""
Guided = Callable[[torch.Tensor, torch.Tensor, "float | torch.Tensor"], torch.Tensor]
"""Combines the predictions for the empty prompt and for the prompt at a guidance scale."""


def predictor(backbone: Backbone, schedule: Schedule) -> Predict:
    """`Backbone.predict` at the times of a schedule."""

    def predict(
        network: torch.nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        guidance: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        return backbone.predict(network, x_t, schedule.timestep(t), condition, guidance)

    return predict


def interval_scale(
    scale: float | torch.Tensor, above: float | torch.Tensor, t: torch.Tensor, highest: torch.Tensor
) -> torch.Tensor:
    """Guidance at the times t (N,): `scale` up to `highest`, `above` beyond it.

    This is "Applying Guidance in a Limited Interval" (Kynkaanniemi et al., arXiv 2404.07724, eq. 6), without
    its lower end. Everything but t may be of shape (N,) too.
    """
    return torch.where(t <= highest, scale, above)


class Scores:
    """Guided predictions of the teacher and of the fake model.

    Args:
        config: gives the guidance of both and the range of times.
        schedule: the teacher's.
        predict: asks a network.
        teacher: the frozen network.
        fake: the fake model's network.
        null: one empty prompt.
        shape: (C, H, W) of the latents.
        guide: combines two predictions; ``None`` for a network that takes the guidance as an input.
    """

    def __init__(
        self,
        config: DistillConfig,
        schedule: Schedule,
        predict: Predict,
        teacher: torch.nn.Module,
        fake: torch.nn.Module,
        null: Condition,
        shape: tuple[int, ...],
        guide: Guided | None = guided,
    ) -> None:
        self.config, self.schedule, self.predict, self.shape = config, schedule, predict, shape
        self.teacher_network, self.fake_network, self.null = teacher, fake, null
        self.guide = guide
        # the last time at which the teacher is guided
        highest = torch.tensor(config.objective.guidance_max_timestep, dtype=torch.float64)
        self.highest_guided = schedule.times(highest)

    def draw(self, draws: Draws, n: int) -> Drawn:
        """Times "t" (n,) and "noise" (n, C, H, W) of the places where the models are compared."""
        low, high = self.config.objective.min_timestep, self.config.objective.max_timestep
        return {
            "t": draws.times("t", n, self.schedule, low, high),
            "noise": draws.normal("noise", n, self.shape),
        }

    def at(self, x0: torch.Tensor, drawn: Drawn, condition: Condition) -> Place:
        """The noisy place of images x0 (N, C, H, W), at the times and with the noise that `draw` gave."""
        return Place(self, x0, drawn, condition)

    def teacher(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """What the guided teacher predicts, (N, C, H, W) float32."""
        options = self.config.objective
        scale: float | torch.Tensor = options.guidance_scale
        if options.guidance_max_timestep < 1:
            scale = interval_scale(scale, options.guidance_scale_above, t, self.highest_guided).view(
                -1, 1, 1, 1
            )
        return self._guided(self.teacher_network, x_t, t, condition, scale)

    def unguided_teacher(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """What the teacher predicts without guidance, (N, C, H, W) float32."""
        return self._guided(self.teacher_network, x_t, t, condition, 1.0)

    def fake(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """What the fake model predicts, with guidance if the options ask for it, (N, C, H, W) float32.

        If guidance is an input of the network, it gets the default guidance, as the student does.
        """
        scale = None if self.guide is None else self.config.fake.guidance_scale
        return self._guided(self.fake_network, x_t, t, condition, scale)

    @torch.no_grad()
    def _guided(
        self,
        network: torch.nn.Module,
        x_t: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        scale: float | torch.Tensor | None,
    ) -> torch.Tensor:
        """Predict with the empty prompt and with the condition in one call; at scale 1 with the latter alone.

        The host does not read a scale that is a tensor, because it would wait for the device.
        """
        if self.guide is None:
            return self.predict(network, x_t, t, condition, scale)
        if not isinstance(scale, torch.Tensor) and scale == 1:
            return self.predict(network, x_t, t, condition)
        both = concatenate([repeat(self.null, len(t)), condition])
        pair = self.predict(network, x_t.repeat(2, 1, 1, 1), t.repeat(2), both)
        return self.guide(*pair.chunk(2), scale)


class Place:
    """The noisy images x_t at which a step compares teacher and fake model. Each score is computed once.

    Attributes:
        x_t: (N, C, H, W), the images with noise.
        t: (N,), the times.
        alpha: (N, 1, 1, 1), as `sigma`, the noise levels at t.
    """

    def __init__(self, scores: Scores, x0: torch.Tensor, drawn: Drawn, condition: Condition) -> None:
        self._scores, self._condition, self.t = scores, condition, drawn["t"]
        self.x_t = scores.schedule.add_noise(x0.detach(), drawn["noise"], self.t)
        self.alpha, self.sigma = scores.schedule.levels(self.t)

    @cached_property
    def x0_teacher(self) -> torch.Tensor:
        """The x0 that the guided teacher predicts here, without gradient."""
        return self._scores.schedule.x0(self._teacher, self.x_t, self.t)

    @cached_property
    def difference(self) -> torch.Tensor:
        """x0_fake - x0_teacher, as exact as the predictions.

        x0 is linear in the prediction and in x_t, and both models have the same x_t, so x_t is omitted here.
        The difference of the two x0 would lose digits where the predictions are nearly equal.
        """
        teacher, fake = self._teacher, self._fake
        change = fake - teacher
        return self._scores.schedule.x0(change, torch.zeros_like(change), self.t)

    @cached_property
    def _teacher(self) -> torch.Tensor:
        return self._scores.teacher(self.x_t, self.t, self._condition)

    @cached_property
    def _fake(self) -> torch.Tensor:
        return self._scores.fake(self.x_t, self.t, self._condition)
