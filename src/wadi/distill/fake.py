"""The fake model, which learns what the student makes: its denoising loss on the student's images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wadi.backbones.condition import Condition, choose, pick
from wadi.diffusion import Schedule
from wadi.distill.config import FakeOptions
from wadi.distill.draws import Drawn, Draws
from wadi.distill.scores import Predict


def fake_loss(
    schedule: Schedule,
    prediction: torch.Tensor,
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    weighting: str,
) -> torch.Tensor:
    """The loss of the fake model at x_t = alpha x0 + sigma n, mean over elements.

    Args:
        schedule: gives alpha and what the network should predict.
        prediction: what the network predicts at x_t.
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


class FakeModel:
    """The training of the fake model.

    Args:
        options: the loss, and how often the prompt is empty.
        schedule: the teacher's.
        predict: asks a network.
        network: the trained network.
        null: the condition of the empty prompt, first dimension 1.
        shape: (C, H, W) of the latents.
    """

    def __init__(
        self,
        options: FakeOptions,
        schedule: Schedule,
        predict: Predict,
        network: torch.nn.Module,
        null: Condition,
        shape: tuple[int, ...],
    ) -> None:
        self.options, self.schedule, self.predict = options, schedule, predict
        self.network, self.null, self.shape = network, null, shape

    def draw(self, draws: Draws, n: int) -> Drawn:
        """What one update draws: "t" (n,), "noise" (n, C, H, W) and "null", one flag for the whole batch."""
        return {
            "t": draws.times("t", n, self.schedule, 0.0, 1.0),
            "noise": draws.normal("noise", n, self.shape),
            "null": draws.chance("null", self.options.null_prompt_probability),
        }

    def loss(self, x0: torch.Tensor, condition: Condition, drawn: Drawn, micro: slice) -> torch.Tensor:
        """`fake_loss` of a micro-batch.

        Args:
            x0: the student's images (n, C, H, W), without gradient.
            condition: of their n prompts.
            drawn: from `draw`.
            micro: the samples of the micro-batch.
        """
        x0, noise, t = x0[micro], drawn["noise"][micro], drawn["t"][micro]
        told = choose(drawn["null"], self.null, pick(condition, micro))
        prediction = self.predict(self.network, self.schedule.add_noise(x0, noise, t), t, told)
        return fake_loss(self.schedule, prediction, x0, noise, t, self.options.weighting)
