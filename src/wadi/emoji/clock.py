"""Training against the clock: as many steps as fit into the given seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

from wadi.errors import WadiError


class TimedSteps:
    """Iterates over (step, share of the training that is over), with a progress bar that shows the time left.

    Attributes:
        done: steps that are complete.
        elapsed: seconds since the first one began.
    """

    def __init__(self, seconds: float, max_train_steps: int, label: str):
        self.seconds, self.max_train_steps = seconds, max_train_steps
        self.done, self.elapsed, self.loss = 0, 0.0, 0.0
        self.bar = tqdm(total=1.0, desc=label, bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}")

    def __iter__(self) -> Iterator[tuple[int, float]]:
        start = time.monotonic()
        with self.bar:
            while self.done < self.max_train_steps:
                self.elapsed = time.monotonic() - start
                used = max(self.elapsed / self.seconds, self.done / self.max_train_steps)
                if used >= 1:
                    break
                self.bar.n = used
                yield self.done, used
                self.done += 1
            self.elapsed = time.monotonic() - start
            self.bar.n = 1.0
            self.bar.refresh()

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
            self.bar.set_postfix_str(f"step {self.done} loss {value:.4f}")


def warmup_cosine(step: int, used: float, warmup_steps: int) -> float:
    """Factor of the learning rate: linear up from zero, times a cosine from 1 to 0 over the share `used`."""
    return min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * used))
