"""A student as a LoRA: its own factors if it is one, and otherwise the best approximation of a rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from wadi.device import chosen_device
from wadi.errors import WadiError
from wadi.files import load_tensors
from wadi.onestep.adapters import TEXT_ENCODER_FOLDER, adapter_folder
from wadi.onestep.components import empty_module
from wadi.onestep.formats.changes import Change
from wadi.onestep.student import network_of

MAX_LOSS = 0.1
"""The share of the squared change that may be lost if nothing else is said."""


class Factors(NamedTuple):
    """A LoRA of one layer: its change is ``alpha / rank * up @ down``."""

    part: str
    layer: str
    down: torch.Tensor
    up: torch.Tensor
    alpha: float


@dataclass
class Loss:
    """What a LoRA loses of a student.

    Attributes:
        layers: by part and layer: the squared change of the weight, and what is lost of it.
        rank: of the LoRA.
        spectrum: the squared singular values of every layer's change, the largest first.
    """

    rank: int
    layers: dict[str, tuple[float, float]] = field(default_factory=dict)
    spectrum: list[torch.Tensor] = field(default_factory=list)

    @property
    def total(self) -> float:
        """The share of the squared change of all weights that is lost, from 0 to 1."""
        return sum(lost for _, lost in self.layers.values()) / sum(whole for whole, _ in self.layers.values())

    def by_layer(self) -> dict[str, float]:
        """The share that is lost of each layer, the largest first."""
        shares = {name: lost / whole for name, (whole, lost) in self.layers.items()}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def rank_for(self, share: float) -> int:
        """The smallest rank that loses at most this share, rounding aside."""
        longest = max(len(values) for values in self.spectrum)
        summed = torch.zeros(longest + 1, dtype=torch.float64)
        for values in self.spectrum:
            summed[: len(values)] += values.flip(0).cumsum(0).flip(0).double()
        return int((summed <= share * summed[0]).nonzero()[0])


def own_factors(pipeline: DiffusionPipeline, adapter: str | Path) -> list[Factors] | None:
    """The factors of an adapter that is a plain LoRA; ``None`` for LoRaD and all others.

    Args:
        pipeline: of the teacher or the student.
        adapter: folder or hub id of the adapter.
    """
    folder = adapter_folder(adapter)
    config = PeftConfig.from_pretrained(folder)
    if (
        not isinstance(config, LoraConfig)
        or config.use_dora
        or config.bias != "none"
        or config.modules_to_save
    ):
        return None
    if (folder / TEXT_ENCODER_FOLDER).is_dir():
        return None
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    network = network_of(pipeline)
    empty = empty_module(type(network), Path(pipeline.name_or_path) / part)
    inject_adapter_in_model(config, empty)
    tensors = load_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    found = []
    for name, layer in empty.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = (tensors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
            found.append(Factors(part, name, down, up, layer.scaling["default"] * len(down)))
    return found


def approximated(
    changed: Iterable[Change], rank: int, dtype: torch.dtype | None
) -> tuple[list[Factors], Loss]:
    """Approximate changes by factors of a rank, by singular values. No other factors lose less.

    Args:
        changed: the changes of weights.
        rank: of the LoRA, at least 1; a smaller layer gets its own rank, which loses nothing.
        dtype: of the factors; ``None`` for that of the teacher's files.

    Returns:
        The factors, and what they lose, measured with them as they are written.

    Raises:
        WadiError: a bias has changed, or nothing has.
    """
    found, loss, device = [], Loss(rank), chosen_device()
    for change in changed:
        if change.parameter != "weight" or change.difference.ndim < 2:
            raise WadiError(
                f"--format lora: the adapter changes the {change.parameter} of {change.layer}, which a LoRA "
                "cannot; choose --format lycoris-diff"
            )
        matrix = change.difference.flatten(1).to(device)
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        kept = min(rank, len(S))
        root = S[:kept].sqrt()
        up = (U[:, :kept] * root).to("cpu", dtype or change.dtype)
        down = (root[:, None] * V[:kept]).to("cpu", dtype or change.dtype)
        lost = (matrix - up.to(matrix) @ down.to(matrix)).square().sum()
        loss.layers[f"{change.part}.{change.layer}"] = matrix.square().sum().item(), lost.item()
        loss.spectrum.append(S.square().cpu())
        found.append(_shaped(change, down, up))
    if not found:
        raise WadiError("--format lora: the adapter changes no weight; name a student's adapter")
    return found, loss


def check_loss(loss: Loss, max_loss: float) -> None:
    """Raise if a LoRA loses more than it may.

    Raises:
        WadiError: it does; the message names the rank that would not.
    """
    if loss.total > max_loss:
        raise WadiError(
            f"--rank {loss.rank}: such a LoRA loses {loss.total:.1%} of the squared change of the weights, "
            f"and --max-loss allows {max_loss:.1%}; give --rank {loss.rank_for(max_loss)}, allow more with "
            "--max-loss, or choose --format lycoris-diff, which loses nothing"
        )


def lora_tensors(
    factors: Sequence[Factors], names: Iterable[str], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA as kohya's scripts write them, or for transformers as diffusers does.

    Args:
        factors: of the layers.
        names: of the layers; see `adapter_name`.
        dtype: of the factors; ``None`` for the one that they have.
    """
    tensors = {}
    for factor, name in zip(factors, names, strict=True):
        down, up = factor.down.to(dtype or factor.down.dtype), factor.up.to(dtype or factor.up.dtype)
        if name.startswith("transformer."):
            tensors[f"{name}.lora_A.weight"] = down
            tensors[f"{name}.lora_B.weight"] = up * (factor.alpha / len(down))
        else:
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.alpha"] = torch.tensor(float(factor.alpha))
    return tensors


def _shaped(change: Change, down: torch.Tensor, up: torch.Tensor) -> Factors:
    rank, shape = len(down), change.difference.shape
    if len(shape) > 2:  # a convolution: its own window, and then one of a single pixel
        down, up = down.unflatten(1, shape[1:]), up.reshape(*up.shape, *[1] * (len(shape) - 2))
    return Factors(change.part, change.layer, down, up, float(rank))
