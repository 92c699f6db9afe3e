"""Training for a given time: as many steps as fit into so many seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from wadi.errors import WadiError
from wadi.progress import progress


class TimedSteps:
    """Iterates over (step, share of the training that is over), with a progress bar that shows the time left.

    Args:
        seconds: training time.
        max_train_steps: most steps, even if time is left.
        label: what the bar says.
        done: number of steps that were complete before, if the training is resumed.
        elapsed: seconds that they took.

    Attributes:
        done: number of steps that are complete.
        elapsed: seconds since the first step began.
    """

    def __init__(
        self, seconds: float, max_train_steps: int, label: str, done: int = 0, elapsed: float = 0.0
    ) -> None:
        self.seconds, self.max_train_steps = seconds, max_train_steps
        self.done, self.elapsed, self.loss = done, elapsed, 0.0
        self.start = time.monotonic()
        self.bar = progress(total=1.0, desc=label, bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}")

    def __iter__(self) -> Iterator[tuple[int, float]]:
        self.start = time.monotonic() - self.elapsed
        self.bar.reset()  # else its rate would count from the time when the bar was made
        with self.bar:
            while self.done < self.max_train_steps:
                used = self._used(self.done)
                if used >= 1:
                    break
                self.bar.n = used if self.done else 0.0
                yield self.done, used
                self.done += 1
            self.elapsed = time.monotonic() - self.start
            self.bar.n = 1.0
            self.bar.refresh()

    def _used(self, steps: int) -> float:
        """Share of the training that is over now, after so many steps."""
        self.elapsed = time.monotonic() - self.start
        return max(self.elapsed / self.seconds, steps / self.max_train_steps)

    def show(self, loss: torch.Tensor) -> None:
        """Show the loss of every 50th step, because reading the loss waits for the device.

        Raises:
            WadiError: the loss was not finite twice in a row.
        """
        if self.done % 50 == 0:
            value, before = loss.item(), self.loss
            self.loss = value
            if not (math.isfinite(value) or math.isfinite(before)):
                raise WadiError(f"step {self.done}: the loss is {value}; lower --learning-rate")
            # the bar divides this share by the time until now, so the running step must be in it
            self.bar.n = min(1.0, self._used(self.done + 1))
            self.bar.set_postfix_str(f"step {self.done} loss {value:.4f}")


def warmup_cosine(step: int, used: float, warmup_steps: int) -> float:
    """Factor of the learning rate: a linear warm-up from zero, times a cosine that falls from 1 to 0.

    Args:
        step: number of the steps before this one.
        used: share of the training that is over.
        warmup_steps: length of the warm-up.
    """
    return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * used))
