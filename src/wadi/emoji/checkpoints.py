"""Checkpoints of a timed training, and how it goes on from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wadi.distill.checkpoint import (
    CHECKPOINT,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from wadi.emoji.clock import TimedSteps
from wadi.emoji.training import LatentTraining
from wadi.errors import WadiError
from wadi.outputs import Output


class TimedCheckpoints:
    """Saves a training every so many seconds, and keeps its last checkpoint.

    Args:
        folder: the folder of the checkpoints; None saves nothing.
        every: seconds of training between checkpoints.
        options: the options that decide the numbers. A checkpoint goes on only under the same ones.

    Raises:
        WadiError: the folder holds a checkpoint of other options or one that cannot be read, or no folder can
            be written there.
    """

    def __init__(self, folder: Path | None, every: float, options: Mapping[str, Any]) -> None:
        self.folder, self.every, self.saved_at = folder, every, 0.0
        text = json.dumps(options, sort_keys=True, default=os.fspath)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = None
        if folder is None:
            return
        Output(folder / "step-000000", CHECKPOINT, overwrite=True, option="--checkpoints").check()
        self.path = latest_checkpoint(folder)
        if self.path is not None and read_state(self.path).get("config") != self.fingerprint:
            raise WadiError(
                f"--checkpoints {folder}: {self.path.name} was trained with other options; "
                "give the options of that training, or name another folder"
            )

    def restore(self, training: LatentTraining, generator: torch.Generator) -> tuple[int, float]:
        """Bring the training and its generator to the last checkpoint, if there is one.

        Returns:
            The number of steps that are done, and the seconds that they took.

        Raises:
            WadiError: the checkpoint is damaged.
        """
        if self.path is None:
            return 0, 0.0
        training.make_moments()
        live = training.update.tensors()
        expected = live | {"random": {"state": generator.get_state()}}
        groups, state = load_checkpoint(self.path, expected, self.fingerprint)
        for name, tensors in live.items():
            for key, tensor in tensors.items():
                tensor.copy_(groups[name][key])
        generator.set_state(groups["random"]["state"])
        self.saved_at = float(state["seconds"])
        return int(state["step"]), self.saved_at

    def save_when_due(self, training: LatentTraining, generator: torch.Generator, steps: TimedSteps) -> None:
        """Save, if the last checkpoint is old enough. Call it after every step.

        Raises:
            WadiError: the checkpoint cannot be written.
        """
        if self.folder is None or steps.elapsed - self.saved_at < self.every:
            return
        groups = training.update.tensors() | {"random": {"state": generator.get_state()}}
        state = {"config": self.fingerprint, "seconds": steps.elapsed}
        save_checkpoint(self.folder, steps.done + 1, groups, state, limit=1)
        self.saved_at = steps.elapsed
