"""Checkpoints: folders such as `checkpoints/step-000100/`, which are either complete or absent.

    student.safetensors, fake.safetensors             the adapters
    ema.safetensors                                   the student's moving average
    student_optimizer.safetensors, fake_optimizer...  AdamW's moments and step, as "<parameter>.<moment>"
    state.json                                        format, step, config fingerprint, samples per step,
                                                      seconds, skipped steps (total, in a row), loss scale

Random numbers need no entry, because they depend on (seed, step, name) alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wadi.errors import WadiError
from wadi.files import load_tensors, read_json, save_tensors, write_json
from wadi.outputs import Output, remove_written

Tensors = Mapping[str, torch.Tensor]
CHECKPOINT = "checkpoints"
"""The name of the writer in the marker of these folders."""

FORMAT = 2
"""Number of the format above. A checkpoint of another format is refused."""


def save_checkpoint(
    folder: Path, step: int, groups: Mapping[str, Tensors], state: Mapping[str, Any], limit: int | None
) -> Path:
    """Write `folder`/step-N under a temporary name, rename it, then remove the oldest beyond `limit`.

    A checkpoint folder into which the user has put a file is kept.

    Raises:
        WadiError: the folder cannot be written; nothing half-written stays, and older checkpoints do.
    """
    path = folder / f"step-{step:06d}"
    with Output(path, CHECKPOINT, overwrite=True).writing() as temporary:
        for name, tensors in groups.items():
            save_tensors(temporary / f"{name}.safetensors", tensors)
        write_json(temporary / "state.json", {"format": FORMAT, "step": step, **state})
    for old in _checkpoints(folder)[: -limit if limit else 0]:
        remove_written(old)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return next(reversed(_checkpoints(folder)), None)


def checkpoint_batch(path: Path) -> int:
    """The samples per step, of all processes together, with which a checkpoint was trained.

    Raises:
        WadiError: missing, damaged or of another format.
    """
    batch = read_state(path).get("batch")
    if not isinstance(batch, int) or batch < 1:
        raise WadiError(f"{path}: does not say how many samples per step has; resume from another checkpoint")
    return batch


def load_checkpoint(
    path: Path, expected: Mapping[str, Tensors], fingerprint: str
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read a checkpoint and check it against the tensors that it must hold.

    Returns:
        Its groups of tensors, on the CPU, and its state.

    Raises:
        WadiError: missing or damaged files, another format, other names or shapes, or a run with other
            options.
    """
    state = read_state(path)
    if state.get("config") != fingerprint:
        raise WadiError(f"{path}: was trained with other options; resume it with its own config.yaml")
    groups = {name: load_tensors(path / f"{name}.safetensors") for name in expected}
    for name, tensors in expected.items():
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        if shapes != {key: tuple(value.shape) for key, value in groups[name].items()}:
            raise WadiError(f"{path / name}.safetensors: does not fit this model; name the run's own teacher")
    return groups, state


def read_state(path: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint.

    Raises:
        WadiError: missing, damaged or of another format.
    """
    state = read_json(path / "state.json")
    if not isinstance(state, dict):
        raise WadiError(
            f"{path / 'state.json'}: is damaged, because it holds no object; resume from another checkpoint"
        )
    if state.get("format") != FORMAT:
        raise WadiError(
            f"{path}: was written by another version of wadi (checkpoint format {state.get('format', 0)}, "
            f"not {FORMAT}); start a new run, or resume it with that version"
        )
    return state


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = {int(m[1]): p for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))}
    return [found[step] for step in sorted(found)]
