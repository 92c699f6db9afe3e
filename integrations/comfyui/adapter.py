"""An adapter of wadi on disk: its angles, and the record of its student."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

WEIGHTS_FILE = "adapter_model.safetensors"
STUDENT_FILE = "student.json"
PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")
_PREFIX = "base_model.model."  # of every key in files of PEFT

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Student:
    """How a student is sampled.

    Attributes:
        prediction: what its network predicts, one of `PREDICTIONS`.
        steps: where the network is called, the first at 1, pure noise: fractions of the timesteps, or the
            sigmas of a flow.
        alpha_T_squared: of the first step; ``None`` for the value of the base's own noise schedule.
    """

    prediction: str
    steps: tuple[float, ...] = (1.0,)
    alpha_T_squared: float | None = None  # noqa: N815


def weights_file(path: str | Path) -> Path:
    """The file with the weights of an adapter, which is given as that file or as its folder.

    Raises:
        ValueError: it does not exist.
    """
    path = Path(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; give the folder or the weights of a LoRaD adapter")
    return file


def read_angles(path: str | Path) -> dict[str, Factors]:
    """Read the factors A (out, r) and B (r, inputs // 2) of every layer, by the name that diffusers gives it.

    Args:
        path: the adapter's folder, or its file of weights.

    Raises:
        ValueError: the file is missing, cannot be read, or is not a LoRaD adapter and nothing else.
    """
    file = weights_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key.removeprefix(_PREFIX): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors ({error}); fetch the file again") from error
    layers = {key.removesuffix(".lorad_A") for key in tensors if key.endswith(".lorad_A")}
    if not layers:
        raise ValueError(f"{file}: holds no LoRaD adapter; other adapters have their own loaders")
    expected = {f"{layer}.lorad_{factor}" for layer in layers for factor in "AB"}
    if missing := expected - tensors.keys():
        raise ValueError(f"{file}: lacks {min(missing)}; fetch the file again")
    if others := tensors.keys() - expected:
        raise ValueError(
            f"{file}: holds {len(others)} tensors that are not angles, such as {min(others)}; this node "
            "turns weights only, so export the merged model with wadi export and load that"
        )
    result = {layer: (tensors[f"{layer}.lorad_A"], tensors[f"{layer}.lorad_B"]) for layer in sorted(layers)}
    for layer, (A, B) in result.items():
        if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[0]:
            raise ValueError(
                f"{file}: the factors of {layer} have the shapes {tuple(A.shape)} and {tuple(B.shape)}, "
                "which do not belong together; fetch the file again"
            )
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(f"{file}: the angles of {layer} are not finite; the adapter is broken")
    return result


def read_student(path: str | Path) -> Student | None:
    """Read ``student.json`` beside the weights of an adapter; ``None`` where there is none.

    Args:
        path: the adapter's folder, or its file of weights.

    Raises:
        ValueError: the record cannot be read, says something that no student has, or is beside several
            adapters.
    """
    weights = weights_file(path)
    file = weights.with_name(STUDENT_FILE)
    if not file.is_file():
        return None
    if others := sorted(other.name for other in weights.parent.glob("*.safetensors") if other != weights):
        raise ValueError(
            f"{file}: may belong to {weights.name} or to {others[0]}; give every adapter a folder of its own"
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error}); fetch the file again") from error
    if problem := _problem(record):
        raise ValueError(f"{file}: {problem}; fetch the file again")
    return Student(record["prediction"], tuple(record["steps"]), record.get("alpha_T_squared"))


def _problem(record: Any) -> str | None:
    """What is wrong with the content of ``student.json``, or None."""
    if not isinstance(record, dict):
        return "does not hold an object"
    if record.get("prediction") not in PREDICTIONS:
        return f"prediction is {record.get('prediction')!r} and must be one of {', '.join(PREDICTIONS)}"
    steps = record.get("steps")
    if not isinstance(steps, list) or not all(type(step) in (int, float) for step in steps):
        return "steps must be a list of numbers"
    if steps[:1] != [1] or steps != sorted(set(steps), reverse=True) or steps[-1] <= 0:
        return f"steps are {steps} and must fall from 1 towards 0"
    alpha = record.get("alpha_T_squared")
    if alpha is not None and not (isinstance(alpha, float) and 0 < alpha < 1):
        return "alpha_T_squared must be null or a number between 0 and 1"
    return None
