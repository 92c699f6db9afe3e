"""The options of learning a word, and the words that it needs: prepositions, templates, first values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wadi.errors import WadiError
from wadi.onestep.arguments import check_seed, finite_number, whole_number

PREPOSITIONS = (
    *("about", "above", "across", "after", "against", "along", "among", "and", "around", "as", "at", "atop"),
    *("before", "behind", "below", "beneath", "beside", "between", "beyond", "by", "down", "from", "in"),
    *("inside", "into", "left", "near", "next", "of", "off", "on", "onto", "out", "outside", "over", "past"),
    *("right", "through", "to", "toward", "under", "underneath", "up", "upon", "with", "within", "without"),
)
"""Words towards which a relation is steered, as far as the model's tokenizer has them as one token. Some of
them build prepositions ("left of", "next to"); ReVersion starts from "and"."""

UNIMPORTANT = ("a", "an", "the", "is", "are", "some", "two", "it", "its")
"""Words of captions from which a relation is not steered away."""

TEMPLATES = (
    "a {}",
    "a picture of a {}",
    "an image of a {}",
    "a drawing of a {}",
    "a photo of a {}",
    "a rendering of a {}",
    "a close photo of a {}",
    "a good photo of a {}",
    "a photo of one {}",
    "the photo of a {}",
)
"""Captions of a subject without captions, as far as the model's tokenizer has their words as one token
each."""

TOKENS = {"relation": "<R>", "subject": "<S>"}
"""The new word, by what is learned."""
INITIALIZERS = {"relation": "and", "subject": "picture"}
"""The word whose embedding the new word starts from."""
LEARNING_RATES = {"relation": 0.2, "subject": 0.4}
"""Highest learning rate, as a multiple of the root mean square of the numbers of that embedding."""


@dataclass(frozen=True)
class InvertConfig:
    """Learn what images share as a new word, on a multi-step Stable Diffusion model."""

    examples: Path
    """Folder of images. Their captions are in metadata.jsonl or metadata.csv (columns file_name and text), or
    in a .txt file beside each image. They contain the new word, such as "a panda <R> a rocket" for a
    relation. A subject needs no captions."""
    out: Path = Path("runs/inversion")
    """Folder to write: learned_embeds.safetensors, inversion.json, pictures.png. It must be new or empty."""
    model: str | None = None
    """Folder or hub id of the multi-step model; if not given, the teacher that comes with wadi."""
    kind: Literal["auto", "relation", "subject"] = "auto"
    """What is learned. With auto it is a relation if the new word stands between two objects in the first
    caption, and a subject if not."""
    token: str | None = None
    """The new word; if not given, <R> for a relation and <S> for a subject."""
    initializer_token: str | None = None
    """The word whose embedding the new word starts from; if not given, "and" for a relation and "picture" for
    a subject."""
    num_vectors: int = 1
    """Number of embeddings of the new word. If there are several, the word must be in lower case."""
    max_train_steps: int = 400
    """Number of updates."""
    train_batch_size: int = 8
    """Images in each update."""
    learning_rate: float | None = None
    """Highest learning rate of AdamW, as a multiple of the root mean square of the numbers of the
    --initializer-token's embedding, which differs between models. It falls to zero along a cosine. If not
    given, it is 0.2 for a relation and 0.4 for a subject, whose embedding must change more."""
    steering_weight: float = 0.01
    """Weight of the loss that steers a relation towards prepositions; 0 omits it."""
    steering_temperature: float = 0.07
    """Temperature of that loss."""
    num_positives: int = 4
    """Number of prepositions in that loss, which are drawn anew for every update."""
    prepositions: tuple[str, ...] = ()
    """Words to steer a relation towards, each one token of the model; if not given, English prepositions."""
    focal_alpha: float = 0.5
    """How much more often timesteps of high noise are drawn, from 0 (not at all) to 1; for a relation
    only."""
    lowest_timestep: int = 0
    """Lowest timestep that is drawn; for a relation only. The layout of an image is decided at high noise,
    and a one-step student knows only the last timestep."""
    seed: int = 0
    """Seed of everything that is random."""
    gradient_checkpointing: bool = False
    """Compute activations of the U-Net twice instead of keeping them: less memory, more time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the networks; the new embeddings are always float32."""
    device: str | None = None
    """Device to train on, such as cpu or cuda:1; if not given, a GPU if there is one."""

    def check(self) -> None:
        """Raise a `WadiError` that names the option if a value is outside its range."""
        check_seed(self.seed, name="--seed")
        for name in ("num_vectors", "max_train_steps", "train_batch_size", "num_positives"):
            whole_number(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        whole_number("--lowest-timestep", self.lowest_timestep, 0)
        finite_number("--steering-weight", self.steering_weight, 0)
        if not 0 <= self.focal_alpha <= 1:
            raise WadiError(f"--focal-alpha {self.focal_alpha}: must be between 0 and 1")
        for name in ("learning_rate", "steering_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise WadiError(f"--{name.replace('_', '-')} {value}: must be a positive number")
