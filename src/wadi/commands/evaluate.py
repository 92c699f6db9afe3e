"""`wadi evaluate`: score images of captions against real ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from wadi import emoji
from wadi.emoji import judge as judge  # adds its features to those that can be chosen
from wadi.metrics import evaluate as protocol


@dataclass(frozen=True)
class EvaluateOptions(protocol.EvaluateConfig):
    """Generate images of captions and compare them with a reference set."""

    model: str | None = None
    """Exported pipeline, teacher of --adapter, or multi-step pipeline: folder or hub id; the teacher that
    comes with wadi if not given."""
    features: Literal["inception", "emoji"] = "inception"
    """Feature space of the distances: Inception as in published figures, or the judge of the emoji world."""


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Generate what is missing, measure, and write the result; returns its figures.

    Of several processes (`accelerate launch -m wadi evaluate ...`) each makes its share of the images, and
    the first one measures.

    A Frechet distance of too few images is omitted, which is told before anything is generated.

    Raises:
        WadiError: an input cannot be read, the folder holds images of other settings, or the images are too
            few for every figure that the reference is for.
    """
    model = str(emoji.teacher_folder()) if options.model is None else options.model
    return protocol.evaluate(dataclasses.replace(options, model=model))
