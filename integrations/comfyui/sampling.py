"""Where a student is called: the noise levels of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def chosen(steps: Sequence[float], count: int, flow: bool) -> list[float]:
    """Choose `count` of a student's steps.

    Args:
        steps: all of them, the first at 1.
        count: how many; 0 for all.
        flow: whether they are the sigmas of a flow, where a part of them is not evenly spaced.

    Raises:
        ValueError: the student has fewer, or is a flow and has more than one and other than `count`.
    """
    count = count or len(steps)
    if count > len(steps):
        raise ValueError(
            f"steps: {count} asked for, and the student was made for {len(steps)}; set 0 for its own number"
        )
    if flow and count not in (1, len(steps)):
        raise ValueError(f"steps: this student takes 1 or {len(steps)}, not {count}")
    return [steps[i * len(steps) // count] for i in range(count)]


def discrete_sigmas(
    table: torch.Tensor, steps: Sequence[float], alpha_T_squared: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the noise levels of steps on a schedule of betas, as ComfyUI counts them: sigma / alpha.

    Args:
        table: (T,) sigma / alpha of every timestep.
        steps: fractions of T, the first at 1.
        alpha_T_squared: alpha^2 of the last timestep if it is not the schedule's own.

    Returns:
        The table (T,) with the student's own last entry, and the levels of its steps with 0 behind them,
        (steps + 1,); both float32.
    """
    table = table.detach().float().clone()
    if alpha_T_squared is not None:
        table[-1] = math.sqrt((1 - alpha_T_squared) / alpha_T_squared)
    times = [max(round(step * len(table)) - 1, 0) for step in steps]
    return table, torch.cat((table[times], table.new_zeros(1)))


def flow_sigmas(steps: Sequence[float]) -> torch.Tensor:
    """The noise levels of a flow's steps with 0 behind them, (steps + 1,) float32."""
    return torch.tensor([*steps, 0.0])
