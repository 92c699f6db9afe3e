"""The original layout of transformers, found out by asking diffusers' own reader.

The reader of Stable Diffusion 3 or FLUX takes each original tensor by its name, and cuts it where several
layers were one. It is run here on a checkpoint that has whatever it asks for: numbers that say from which
tensor and which row they are. What it makes of them says where each row of a layer has its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import nn

from wadi.errors import WadiError

ROWS = 7 * 3072
"""Rows of every numbered tensor: FLUX's reader cuts its widest layer at these, others in halves or thirds."""


class Piece(NamedTuple):
    """Rows of a layer that lie together in an original tensor. All numbers are out of `ROWS`.

    Attributes:
        at: the first row in the original tensor.
        name: of the layer's tensor in diffusers.
        first, last, of: the rows `first` to `last` of the layer's `of` rows.
    """

    at: int
    name: str
    first: int
    last: int
    of: int


class _Asked(dict):
    """A checkpoint that has a numbered tensor under every name that it is asked for."""

    def __init__(self, hints: Iterable[str]) -> None:
        super().__init__(dict.fromkeys(hints))
        self.names: list[str] = []

    def __missing__(self, name: str) -> torch.Tensor:
        first = len(self.names) * ROWS
        self.names.append(name)
        return torch.arange(first, first + ROWS, device="cpu")

    def pop(self, name: str) -> torch.Tensor:
        return self[name]


def transformer_tensors(transformer: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of an `SD3Transformer2DModel` or a `FluxTransformer2DModel` by their original names.

    Raises:
        WadiError: diffusers' reader of the original layout does not give every weight of the network.
    """
    kind, state = type(transformer).__name__, transformer.state_dict()
    asked = _Asked(_hints(transformer))
    read = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"](asked, config=dict(transformer.config))
    if wrong := sorted(read.keys() ^ state.keys()):
        raise WadiError(
            f"--format single-file: the original layout has no place for {len(wrong)} weights of this "
            f"{kind}, such as {wrong[0]}; choose --format diffusers"
        )
    pieces = defaultdict(list)
    for name, numbers in read.items():
        for original, piece in _pieces(name, numbers):
            pieces[asked.names[original]].append(piece)
    return {name: _joined(name, sorted(found), state) for name, found in pieces.items()}


def _hints(transformer: nn.Module) -> list[str]:
    """Names by which the readers count blocks, and see which options a network has."""
    config = transformer.config
    if type(transformer).__name__ == "SD3Transformer2DModel":
        norms = ["ln_q"] if config.qk_norm is not None else []
        seconds = [f"block.{block}.attn2." for block in config.dual_attention_layers]
        return [f"joint_blocks.{config.num_layers - 1}.", *norms, *seconds]
    guidance = ["guidance"] if config.guidance_embeds else []
    return [
        f"double_blocks.{config.num_layers - 1}.",
        f"single_blocks.{config.num_single_layers - 1}.",
        *guidance,
    ]


def _pieces(name: str, numbers: torch.Tensor) -> Iterable[tuple[int, Piece]]:
    """Where runs of rows come from: the number of the original tensor, and the piece."""
    breaks = (numbers[1:] != numbers[:-1] + 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(numbers)]
    for first, last in pairwise(bounds):
        original, at = divmod(int(numbers[first]), ROWS)
        yield original, Piece(at, name, first, last, len(numbers))


def _joined(original: str, pieces: list[Piece], state: dict[str, torch.Tensor]) -> torch.Tensor:
    ends = [piece.at + piece.last - piece.first for piece in pieces]
    if [piece.at for piece in pieces] != [0, *ends[:-1]] or ends[-1] != ROWS:
        raise WadiError(
            f"--format single-file: diffusers leaves out a part of {original}, which other programs need; "
            "choose --format diffusers"
        )
    parts = [_rows(state[piece.name], piece) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    if (piece.first, piece.last) == (0, piece.of):
        return tensor
    return tensor[piece.first * len(tensor) // piece.of : piece.last * len(tensor) // piece.of]
