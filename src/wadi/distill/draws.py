"""Random numbers of a step by name, so that a term comes or goes without moving another's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from wadi.backbones.condition import Condition
from wadi.diffusion import Schedule

Drawn = dict[str, torch.Tensor]
"""What one part of the training drew for a step. The first dimension is this process's samples."""


@dataclass(frozen=True)
class Draws:
    """Random numbers that depend on (seed, step, name) alone.

    Every process draws the numbers for the samples of all processes and keeps its share. So several processes
    together draw what one process would draw, and a resumed run draws the same numbers on any number of
    processes.

    Args:
        seed: the run's.
        step: number of the step, from 0.
        device: where numbers are drawn. `indices` draws on the CPU.
        process: number of this process.
        processes: how many there are.
        path: comes before every name; see `of`.
    """

    seed: int
    step: int
    device: torch.device
    process: int = 0
    processes: int = 1
    path: str = ""

    def of(self, name: str) -> Draws:
        """The draws of a part of the training. Equal names in two parts give different numbers."""
        return replace(self, path=f"{self.path}{name}/")

    def normal(self, name: str, n: int, shape: Sequence[int]) -> torch.Tensor:
        """Noise (n, *shape) ~ N(0, I), float32."""
        whole = (n * self.processes, *shape)
        return self._share(torch.randn(whole, device=self.device, generator=self._generator(name)), n)

    def times(self, name: str, n: int, schedule: Schedule, low: float, high: float) -> torch.Tensor:
        """Times (n,) between two fractions of a schedule's range; see `Schedule.sample_t`."""
        return self._share(schedule.sample_t(n * self.processes, low, high, self._generator(name)), n)

    def indices(self, name: str, n: int, count: int) -> torch.Tensor:
        """Numbers (n,) from 0 to count - 1, int64, on the CPU."""
        generator = self._generator(name, torch.device("cpu"))
        return self._share(torch.randint(count, (n * self.processes,), generator=generator), n)

    def choice(self, name: str, count: int) -> int:
        """One number from 0 to count - 1, which the host knows. All processes get the same."""
        return int(torch.randint(count, (), generator=self._generator(name, torch.device("cpu"))))

    def prompts(self, n: int, count: int) -> torch.Tensor:
        """Numbers (n,) of the prompts of a step, of a set of `count`."""
        return self.indices("prompts", n, count)

    def chance(self, name: str, probability: float) -> torch.Tensor:
        """True with the given probability, 0-dimensional. All processes get the same value."""
        return torch.rand((), device=self.device, generator=self._generator(name)) < probability

    def _generator(self, name: str, device: torch.device | None = None) -> torch.Generator:
        words = [self.seed, self.step, *f"{self.path}{name}".encode()]
        seed = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
        return torch.Generator(device or self.device).manual_seed(int(seed))

    def _share(self, whole: torch.Tensor, n: int) -> torch.Tensor:
        """This process's part of the first dimension. A copy, so that the rest can be freed."""
        return whole if self.processes == 1 else whole.narrow(0, self.process * n, n).clone()


@dataclass(frozen=True)
class StepInputs:
    """This process's share of everything that is random in one step, on the device.

    n = train_batch_size x gradient_accumulation_steps.

    Attributes:
        z: (n, C, H, W) float32, the student's noise.
        rollout: the steps that the student takes from it; see `Student.draw`.
        condition: of n prompts, embeddings in the compute dtype.
        place: where the student's images are judged; see `Scores.draw`.
        terms: what each term draws, in their order.
        fake: what each update of the fake model draws; see `FakeModel.draw`.
    """

    z: torch.Tensor
    rollout: Drawn
    condition: Condition
    place: Drawn
    terms: tuple[Drawn, ...]
    fake: tuple[Drawn, ...]

    @property
    def steps(self) -> int:
        """How many steps the student takes."""
        return self.rollout["t"].shape[1] if self.rollout else 1

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor, in a fixed order."""
        groups = ({"z": self.z}, self.rollout, self.condition, self.place, *self.terms, *self.fake)
        return [tensor for group in groups for tensor in group.values()]
