"""Tiny models of every kind that LoRaD adapts, with a configuration and an input for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from wadi import LoRaDConfig


class ConvNet(nn.Module):
    """A plain, a grouped and circularly padded, a strided 1x1 and a depthwise (odd fan-in) convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4, padding_mode="circular", bias=False)
        self.pointwise = nn.Conv2d(12, 6, 1, stride=2)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, dilation=2, padding=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.plain(x).tanh()).tanh()
        return self.head(self.depthwise(self.pointwise(x).tanh()).mean((2, 3)))


class OtherConvNet(nn.Module):
    """Along one axis (odd fan-in, reflected padding; grouped) and along three (circular; strided)."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 8, 3, padding=1, padding_mode="reflect")
        self.grouped_line = nn.Conv1d(8, 12, 3, stride=2, groups=4, bias=False)
        self.volume = nn.Conv3d(1, 4, (1, 2, 3), padding=1, padding_mode="circular")
        self.grouped_volume = nn.Conv3d(4, 6, 3, dilation=(1, 2, 1), groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped_line(self.line(x).tanh()).tanh().view(len(x), 1, 3, 4, -1)
        return self.head(self.grouped_volume(self.volume(x).tanh()).mean((2, 3, 4)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 4, bias=False)
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6)


@dataclass
class Case:
    """A model, how to adapt it, what to feed it, and how many layers turn."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    layers: int
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, **options: Any) -> LoRaDConfig:
        return LoRaDConfig(**{"r": 3, "init_weights": False, **self.options, **options})

    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().eval()

    @staticmethod
    def output(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        out = model(inputs)
        return getattr(out, "logits", out)


CASES = [
    Case("mlp, all-linear", mlp, lambda: numbers(5, 8), 3, {"target_modules": "all-linear"}),
    Case("mlp, names", mlp, lambda: numbers(5, 8), 2, {"target_modules": ["0", "4"]}),
    Case(
        "mlp, excluded",
        mlp,
        lambda: numbers(5, 8),
        2,
        {"target_modules": "all-linear", "exclude_modules": ["2"]},
    ),
    Case(
        "mlp, modules_to_save",
        mlp,
        lambda: numbers(5, 8),
        1,
        {"target_modules": ["0"], "modules_to_save": ["4"]},
    ),
    Case(
        "mlp, rank_pattern",
        mlp,
        lambda: numbers(5, 8),
        3,
        {"target_modules": "all-linear", "rank_pattern": {"^2": 5}},
    ),
    Case("convolutions", ConvNet, lambda: numbers(2, 3, 8, 8), 4, {"target_modules": r"(?!head).+"}),
    Case("gpt2, default", gpt2, tokens, 2, {}),
    Case("gpt2, all-linear", gpt2, tokens, 8, {"target_modules": "all-linear"}),
    Case("llama, default", llama, tokens, 6, {}),
    Case("llama, regex", llama, tokens, 6, {"target_modules": r".*\.(down|up)_proj"}),
    Case(
        "llama, layers_to_transform",
        llama,
        tokens,
        4,
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    ),
    Case(
        "convolutions, one and three axes",
        OtherConvNet,
        lambda: numbers(2, 3, 13),
        4,
        {"target_modules": r"(?!head).+"},
    ),
]
