"""Configuration of the LoRaD adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft.config import PeftConfig
from peft.utils import PeftType


@dataclass
class LoRaDConfig(PeftConfig):
    """Configuration of a [`LoRaDModel`]: low-rank rotation of weights (WaDi, arXiv 2603.08258).

    Args:
        r (`int`):
            Rank of the angles. A layer with fan-in `in` and fan-out `out` gets `r * (out + in // 2)`
            parameters.
        target_modules (`list[str] | str | None`):
            Names of the modules to adapt: a list of names or name endings, a regular expression that matches
            the whole name, or `"all-linear"`. If omitted, PEFT's usual choice for the model's architecture.
            `torch.nn.Linear`, `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, and transformers' `Conv1D` are
            supported. Embeddings are not turned.
        exclude_modules (`list[str] | str | None`):
            Names of modules to omit, as a list of names or name endings, or as a regular expression.
        rank_pattern (`dict[str, int]`):
            Ranks other than `r`, by name or regular expression, for example `{"^down_blocks.*.to_q": 16}`.
        layers_to_transform (`list[int] | int | None`):
            Indices of the layers to adapt; only with a list of `target_modules`.
        layers_pattern (`list[str] | str | None`):
            Name of the `nn.ModuleList` that `layers_to_transform` counts in, for example `"layers"` or `"h"`.
        modules_to_save (`list[str] | None`):
            Other modules that are trained and saved in full.
        bias (`Literal["none", "all", "lorad_only"]`):
            Which biases are trained: none, all of the model, or those of the adapted layers. Trained biases
            belong to the base model: they stay when the adapter is disabled.
        init_weights (`bool`):
            True: start as the identity (A zero, B Xavier uniform). False: A is Xavier uniform too.

    Raises:
        ValueError: a value is out of range, or options contradict each other.
    """

    r: int = field(default=8, metadata={"help": "Rank of the angles."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to adapt: names or name endings, a regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to omit: names or name endings, or a regular expression."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Ranks other than r, by module name or regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; only with a list of target_modules."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList in which layers_to_transform counts."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules that are trained and saved in full."}
    )
    bias: Literal["none", "all", "lorad_only"] = field(
        default="none",
        metadata={"help": "Biases to train: 'none', 'all', or 'lorad_only' (of adapted layers)."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start as the identity (True), or with small random angles (False, for tests)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORAD
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

        if self.r < 1 or any(rank < 1 for rank in self.rank_pattern.values()):
            raise ValueError(
                f"`r` and the ranks in `rank_pattern` must be at least 1, got {self.r}, {self.rank_pattern}."
            )
        if self.bias not in ("none", "all", "lorad_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'lorad_only', got {self.bias!r}.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`.")
