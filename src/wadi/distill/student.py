"""The student as a generator: from noise to a clean latent in one step, or in several."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wadi.backbones import Backbone
from wadi.backbones.condition import Condition
from wadi.diffusion import Schedule
from wadi.distill.config import DistillConfig
from wadi.distill.draws import Drawn, Draws
from wadi.distill.scores import Predict
from wadi.onestep.scheduler import gives_sigmas, step_times, steps_of, student_scheduler


def student_steps(config: DistillConfig, backbone: Backbone) -> tuple[float, ...]:
    """Where the student takes the most steps that it can: fractions of the timesteps, or a flow's sigmas."""
    even = gives_sigmas(type(backbone.pipeline))
    return steps_of(backbone.pipeline.scheduler, backbone.schedule(), config.student.steps, even)


def student_times(config: DistillConfig, backbone: Backbone) -> list[torch.Tensor]:
    """The times of 1, 2, ... steps, exactly as the stock scheduler has them that the student ships with."""
    teacher, even = backbone.pipeline.scheduler, gives_sigmas(type(backbone.pipeline))
    steps = student_steps(config, backbone)
    scheduler = student_scheduler(teacher, config.student.alpha_T_squared, steps, even)
    return [step_times(scheduler, count, even) for count in range(1, len(steps) + 1)]


class Student:
    """A generator of few steps. Between two steps the image is noised again, as the process itself does it:

        x0 = x0(x_t, t);  x_t' = alpha_t' x0 + sigma_t' n,  with fresh noise n

    It is trained by its own roll-out (backward simulation, DMD2, arXiv 2405.14867). The steps before the last
    are taken without gradient, so each step learns from the inputs that it gets when images are made.

    Args:
        schedule: its own, which may end at another alpha_T than the teacher's.
        predict: asks a network.
        network: the trained network.
        times: for every number of steps from 1 on, their times (count,), the first of pure noise.
    """

    def __init__(
        self, schedule: Schedule, predict: Predict, network: torch.nn.Module, times: Sequence[torch.Tensor]
    ) -> None:
        self.schedule, self.predict, self.network, self.times = schedule, predict, network, tuple(times)
        self.rollouts = [own[: k + 1] for own in self.times for k in range(len(own))]
        """The times of every roll-out: each step of each number of steps, after the steps before it."""

    def draw(self, draws: Draws, n: int, shape: tuple[int, ...]) -> Drawn:
        """Draw one of the roll-outs, the same for all samples and processes, and its noise.

        Returns:
            "t" (n, k), the times of its k steps, and "noise" (n, k - 1, C, H, W). Nothing for a student of
            one step.
        """
        if len(self.rollouts) == 1:
            return {}
        times = self.rollouts[draws.choice("steps", len(self.rollouts))]
        noise = draws.normal("noise", n, (len(times) - 1, *shape))
        return {"t": times.repeat(n, 1), "noise": noise}

    def rollout(self, count: int, noise: torch.Tensor) -> Drawn:
        """All of `count` steps, with the noise (n, count - 1, C, H, W) between them; as `draw` returns it."""
        return {"t": self.times[count - 1].repeat(len(noise), 1), "noise": noise}

    def sample(self, z: torch.Tensor, condition: Condition, rollout: Drawn | None = None) -> torch.Tensor:
        """The image x0 (N, C, H, W), float32, of every noise z ~ N(0, I), (N, C, H, W), and prompt.

        Args:
            z: the noise.
            condition: of N prompts.
            rollout: from `draw`; one step if there is nothing in it. Only the last step has a gradient.
        """
        if not rollout:
            return self._x0(z, self.schedule.last.expand(len(z)), condition)
        x_t, times = z, rollout["t"].unbind(1)
        with torch.no_grad():
            for t, after, noise in zip(times, times[1:], rollout["noise"].unbind(1), strict=False):
                x_t = self.schedule.add_noise(self._x0(x_t, t, condition), noise, after)
        return self._x0(x_t, times[-1], condition)

    def _x0(self, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return self.schedule.x0(self.predict(self.network, x_t, t, condition), x_t, t)
