"""`wadi evaluate`: measure images of captions against real images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import PartialState

from wadi import emoji
from wadi.commands.teacher_file import TeacherFile
from wadi.emoji import judge as judge  # adds its feature space to `SPACES`
from wadi.metrics import evaluate as protocol
from wadi.metrics.evaluate_config import EvaluateConfig


@dataclass(frozen=True)
class EvaluateOptions(EvaluateConfig):
    """Make images of captions, and compare them with a reference set."""

    model: str | None = None
    """Exported pipeline, teacher of --adapter, or multi-step pipeline: folder, hub id or single
    .safetensors file; if not given, the teacher that comes with wadi."""
    teacher_file: TeacherFile = field(default_factory=TeacherFile)
    features: Literal["inception", "emoji"] = "inception"
    """Feature space of the distances: Inception as in published figures, or the judge of the emoji world."""


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Make the missing images of captions, measure them, and write and print the figures.

    If there are several processes (accelerate launch -m wadi evaluate ...), each makes a share of the images,
    and the first one measures. A Frechet distance of too few images is omitted, with a warning before
    anything is made.
    """
    model = str(emoji.teacher_folder()) if options.model is None else options.model
    options = dataclasses.replace(options, model=model)
    options.check()
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        model = options.teacher_file.folder(model)
    return protocol.evaluate(dataclasses.replace(options, model=model))
