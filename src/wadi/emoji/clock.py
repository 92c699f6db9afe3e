"""Training against the clock: as many steps as fit into the given seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from wadi.errors import WadiError
from wadi.progress import progress


class TimedSteps:
    """Iterates over (step, share of the training that is over), with a progress bar that shows the time left.

    Attributes:
        done: steps that are complete.
        elapsed: seconds since the first one began.
    """

    def __init__(self, seconds: float, max_train_steps: int, label: str):
        self.seconds, self.max_train_steps = seconds, max_train_steps
        self.done, self.elapsed, self.loss = 0, 0.0, 0.0
        self.start = time.monotonic()
        self.bar = progress(total=1.0, desc=label, bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}")

    def __iter__(self) -> Iterator[tuple[int, float]]:
        self.start = time.monotonic()
        self.bar.reset()  # or its rate would count from when the bar was made
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
        """Share of the training that is over after so many steps, now."""
        self.elapsed = time.monotonic() - self.start
        return max(self.elapsed / self.seconds, steps / self.max_train_steps)

    def show(self, loss: torch.Tensor) -> None:
        """Show the loss of this step; every 50th only, because reading it waits for the device.

        Raises:
            WadiError: it was not finite twice in a row.
        """
        if self.done % 50 == 0:
            value, before = loss.item(), self.loss
            self.loss = value
            if not (math.isfinite(value) or math.isfinite(before)):
                raise WadiError(f"step {self.done}: the loss is {value}; lower --learning-rate")
            # The bar divides its share by the time until now: this step is in both, or the first one's rate
            # would be next to nothing, and the time left years.
            self.bar.n = min(1.0, self._used(self.done + 1))
            self.bar.set_postfix_str(f"step {self.done} loss {value:.4f}")


def warmup_cosine(step: int, used: float, warmup_steps: int) -> float:
    """Factor of the learning rate: linear up from zero, times a cosine from 1 to 0 over the share `used`."""
    return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * used))
