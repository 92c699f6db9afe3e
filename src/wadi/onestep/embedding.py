"""Words that were learned by textual inversion."""

from __future__ import annotations

import os
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.loaders.textual_inversion import TEXT_INVERSION_NAME_SAFE

from wadi.errors import WadiError
from wadi.files import load_tensors
from wadi.onestep.components import first_line


def load_embedding(pipeline: DiffusionPipeline, path: str | os.PathLike) -> str:
    """Teach a pipeline a word of a file, with diffusers' `load_textual_inversion`.

    Args:
        pipeline: one with a CLIP text encoder.
        path: a safetensors file with one entry, (n, D) under the word's name, or a folder that holds
            `learned_embeds.safetensors`.

    Returns:
        The word.

    Raises:
        WadiError: no such file, not of this form or of another model, or the pipeline has the word already.
    """
    if not isinstance(pipeline, TextualInversionLoaderMixin):
        raise WadiError(f"{path}: a {type(pipeline).__name__} cannot take a learned word")
    file = Path(path) / TEXT_INVERSION_NAME_SAFE if Path(path).is_dir() else Path(path)
    tensors = load_tensors(file)
    if len(tensors) != 1 or next(iter(tensors.values())).ndim not in (1, 2):
        raise WadiError(f"{file}: not one learned word; name a file that wadi invert or diffusers wrote")
    ((word, embedding),) = tensors.items()
    width = pipeline.text_encoder.get_input_embeddings().weight.shape[1]
    if embedding.shape[-1] != width:
        raise WadiError(
            f"{file}: {word} has {embedding.shape[-1]} numbers and the model's words have {width}; it was "
            "learned on another model"
        )
    try:
        pipeline.load_textual_inversion({word: embedding})
    except ValueError as error:
        raise WadiError(f"{file}: {first_line(error)}") from error
    return word
