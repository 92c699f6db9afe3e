"""`wadi report`: write the report of a run again."""

from __future__ import annotations

from pathlib import Path

import tyro


def report(run: tyro.conf.Positional[Path], steps: int = 25, guidance_scale: float | None = None) -> None:
    """Write the report of a finished run again.

    Args:
        run: Run folder that wadi distill wrote.
        steps: Number of steps of the teacher's images.
        guidance_scale: Guidance scale of the teacher's images, the same in all steps. If omitted, the
            last one of the distillation.
    """
    from wadi.distill.report import report as write

    print(f"report: {write(run, steps, guidance_scale)}")
