"""Prompts encoded while the training runs: only those that it draws, and a little ahead of it.

What a step draws is known beforehand. Consecutive steps form groups of about `GROUP` prompts. A thread
encodes the groups in order, each on its own, and a group is forgotten when the training has left it. Which
prompts are encoded together depends on the step only. So a resumed run gets the same bits, and the bits do
not depend on how many groups are in memory.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from wadi.backbones import PromptEncoder
from wadi.backbones.condition import Condition
from wadi.errors import WadiError, tell
from wadi.prompts.cache import Embeddings

GROUP = 64
"""Prompts that are encoded together. If a step draws more, they are the prompts of one step."""
AHEAD = 8
"""Most groups in memory. More would not help: they only make up for differences in time between the steps."""
SMALL = 2 * 2**30
"""Bytes: text encoders up to this size stay on the training's GPU."""

WAITED = 60.0
"""Seconds that the training may wait in all before the user is told that encoding is too slow."""

Place = Literal["auto", "gpu", "cpu"]
"""Where text encoders stay during the training; "auto" is the GPU for those up to `SMALL`."""


@dataclass(frozen=True)
class _Group:
    """Encoded prompts of a few steps, and the row of each by its number in the set."""

    rows: dict[int, int]
    embeddings: Embeddings


class Window:
    """Conditions of the prompts of the next steps, in memory.

    A thread starts with the first `take` and ends with `close`. While it lives, the text encoders are loaded.

    Args:
        encoder: of the teacher; nobody else may use it until `close`.
        prompts: the whole set.
        drawn: numbers (n,) of the prompts that this process draws in a step.
        samples: n, how many these are.
        limit: bytes of conditions that may be in memory.
        size: bytes of the condition of one prompt.
        place: where the text encoders stay.

    Attributes:
        waited: seconds that `take` waited for prompts, without the first time.
        worked: seconds that the thread has encoded.
        encoded: prompts that it has encoded.

    Raises:
        WadiError: the limit is below two groups: one for the training, and one that is being encoded.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        prompts: Sequence[str],
        drawn: Callable[[int], torch.Tensor],
        samples: int,
        limit: float,
        size: int,
        place: Place = "auto",
    ) -> None:
        self.encoder, self.prompts, self.drawn, self.place = encoder, prompts, drawn, place
        self.steps = max(1, GROUP // samples)  # a group has these many
        bytes_a_group = self.steps * samples * size
        self.groups = min(AHEAD, int(limit // bytes_a_group))
        if self.groups < 2:
            least = math.ceil(1000 * 2 * bytes_a_group / 2**30) / 1000
            raise WadiError(
                f"--embeddings-limit {limit / 2**30:g}: is too low, because twice the "
                f"{self.steps * samples} prompts that are encoded together must fit; give at least {least:g}"
            )
        self.waited, self.worked, self.encoded = 0.0, 0.0, 0
        self._started: float | None = None
        self._loaded = self._warned = False
        self._coming: dict[int, Future[_Group]] = {}
        self._held = contextlib.ExitStack()
        self._thread = ThreadPoolExecutor(1, "encoding prompts")

    def __len__(self) -> int:
        return len(self.prompts)

    def waits(self, step: int) -> bool:
        """Whether `take` may wait, and raise what has failed in the thread: at the first step of a group."""
        return self._started is None or step % self.steps == 0

    def take(self, indices: torch.Tensor, pin_memory: bool = False, step: int = 0) -> Condition:
        """Conditions of the prompts (N,) that a step draws, in that order; see `Embeddings.take`.

        Raises:
            WadiError: the prompts could not be encoded.
        """
        group = self._group(step // self.steps)
        rows = torch.tensor([group.rows[index] for index in indices.tolist()])
        return group.embeddings.take(rows, pin_memory)

    def numbers(self, steps: int) -> list[int]:
        """Numbers of all prompts that are encoded for the first `steps` steps, in the order of the set."""
        groups = range(-(-steps // self.steps))
        return sorted({number for group in groups for number in self._numbers(group)})

    def told(self) -> str:
        """One line about the time that encoding took."""
        share = 0.0 if self._started is None else self.waited / (time.monotonic() - self._started)
        return (
            f"prompts: {self.encoded} were encoded in {self.worked:.1f} s beside the training, which waited "
            f"{self.waited:.1f} s for them ({share:.1%} of its time)"
        )

    def close(self) -> None:
        """End the thread after what it is encoding, and free the text encoders."""
        self._thread.shutdown(cancel_futures=True)
        self._coming.clear()
        self._held.close()

    def _group(self, number: int) -> _Group:
        """Forget the groups before, ask for those after, wait for this one."""
        wanted = range(number, number + self.groups)
        for other in self._coming.keys() - set(wanted):
            self._coming.pop(other).cancel()
        for other in wanted:
            if other not in self._coming:
                self._coming[other] = self._thread.submit(self._encode, other)
        start = time.monotonic()
        group = self._coming[number].result()
        if self._started is None:
            self._started = time.monotonic()
        else:
            self.waited += time.monotonic() - start
            self._warn()
        return group

    def _warn(self) -> None:
        """Tell once that the training waits for more than a tenth of its time."""
        if self._warned or self.waited < max(WAITED, (time.monotonic() - self._started) / 10):
            return
        self._warned = True
        faster = "" if self.place == "gpu" else "; a new run with --text-encoder-device gpu may be faster"
        tell(f"{self.told()}: the prompts are encoded too slowly{faster}")

    def _numbers(self, group: int) -> list[int]:
        steps = range(group * self.steps, (group + 1) * self.steps)
        return list(dict.fromkeys(number for step in steps for number in self.drawn(step).tolist()))

    def _encode(self, group: int) -> _Group:
        """Encode a group. This runs in the thread."""
        start = time.monotonic()
        try:
            if not self._loaded:
                self._load()
            numbers = self._numbers(group)
            encoded = self.encoder.encode([self.prompts[number] for number in numbers])
        except (RuntimeError, OSError, ValueError, MemoryError) as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            hint = "; --text-encoder-device cpu needs no memory of the GPU" if "memory" in reason else ""
            raise WadiError(
                f"the prompts of step {group * self.steps} could not be encoded: {reason}{hint}"
            ) from error
        self.worked += time.monotonic() - start
        self.encoded += len(numbers)
        return _Group({number: row for row, number in enumerate(numbers)}, Embeddings([encoded]))

    def _load(self) -> None:
        """Load the text encoders, on the CPU first, where their size shows whether the GPU takes them."""
        encoder, gpu = self.encoder, self.encoder.device
        encoder.device = torch.device("cpu")
        self._held.enter_context(encoder.loaded())
        modules = [getattr(encoder.pipeline, part) for part in encoder.parts]
        size = sum(p.nbytes for module in modules for p in module.parameters())
        if self.place == "gpu" or (self.place == "auto" and size <= SMALL):
            encoder.device = gpu
        self._loaded = True
